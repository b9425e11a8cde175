-- Find the jobs whose lease has ended by the server's clock. Changes nothing.
-- KEYS[1]  jobs            set of jobs that have not ended
-- ARGV[1]  attempt_prefix  of attempt keys (same slot)
-- ARGV[2]  site_prefix     of site keys (same slot)
-- ARGV[3]  job_prefix      of job keys (same slot)
-- Returns the jobs that are not posted and whose lease has ended. A lease that is not a number has ended: workers write
-- these records. So has the lease of an attempt whose client another worker process serves by now.
local jobs_key = KEYS[1]
local attempt_prefix, site_prefix, job_prefix = ARGV[1], ARGV[2], ARGV[3]

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function has_ended(lease) return not ((tonumber(lease) or 0) > now) end
local function is_replaced(job, number, holder)
  if not ((tonumber(number or '') or 0) > 0) then return false end  -- it waits in the queue
  local client = redis.call('HGET', job_prefix .. job, 'client')
  local served_by = client and redis.call('HGET', site_prefix .. client, 'holder')
  return served_by and served_by ~= holder
end
local jobs = {}
for _, job in ipairs(redis.call('SMEMBERS', jobs_key)) do
  local attempt = redis.call('HMGET', attempt_prefix .. job, 'posted', 'lease', 'number', 'holder')
  local posted, lease, number, holder = attempt[1], attempt[2], attempt[3], attempt[4]
  if not posted and (has_ended(lease or '') or is_replaced(job, number, holder)) then jobs[#jobs + 1] = job end
end
return jobs
