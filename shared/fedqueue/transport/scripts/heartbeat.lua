-- Renew the leases of a worker's clients and of its jobs.
-- KEYS[1]  config          hash {state, ...}
-- ARGV[1]  worker          token of the worker process
-- ARGV[2]  lease_ms        length of the leases
-- ARGV[3]  current         the job in training, or ''
-- ARGV[4]  attempt         number of the current job's attempt
-- ARGV[5]  progressing     '1' if the current job makes progress; '0' if it has stalled, so that its lease ends
-- ARGV[6]  site_prefix     of site keys (all prefixes: same slot)
-- ARGV[7]  job_prefix      of job keys
-- ARGV[8]  attempt_prefix  of attempt keys
-- ARGV[9]  phase           of the current job: 'fetching', 'training' or 'sending'
-- ARGV[10] job_lease_ms    length of the current job's lease, which is longer in a long transfer
-- ARGV[11...]              clients that the worker serves
-- Returns {state of the run, 1 if the current job is still this attempt's, clients that the worker has lost...}.
--
-- A job that waits in the queue behind the current one has its lease renewed by this busy worker. An idle worker takes
-- a queued job at once; a job that it does not take was lost on the way, and its lease ends.
local config_key = KEYS[1]
local worker, lease_ms, current, attempt, progressing = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5] == '1'
local site_prefix, job_prefix, attempt_prefix = ARGV[6], ARGV[7], ARGV[8]
local phase, job_lease_ms = ARGV[9], ARGV[10]
local first_client = 11

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease_end = now + lease_ms
local function is_open(job)
  return redis.call('EXISTS', job_prefix .. job) == 1 and not redis.call('HGET', attempt_prefix .. job, 'posted')
end

local reply = {redis.call('HGET', config_key, 'state') or '', 0}
for i = first_client, #ARGV do
  local client = ARGV[i]
  local site_key = site_prefix .. client
  if redis.call('HGET', site_key, 'holder') == worker then
    redis.call('HSET', site_key, 'alive', lease_end)
    local job = redis.call('HGET', site_key, 'job')
    if job and job ~= current and current ~= '' and is_open(job) then
      local attempt_key = attempt_prefix .. job
      if redis.call('HGET', attempt_key, 'holder') == worker then redis.call('HSET', attempt_key, 'lease', lease_end) end
    end
  else
    reply[#reply + 1] = client
  end
end
if current ~= '' and is_open(current) and redis.call('HGET', attempt_prefix .. current, 'number') == attempt then
  reply[2] = 1
  local attempt_key = attempt_prefix .. current
  if progressing then
    redis.call('HSET', attempt_key, 'lease', now + job_lease_ms, 'phase', phase, 'stalled', 0)
  else
    redis.call('HSET', attempt_key, 'phase', phase, 'stalled', 1)
  end
end
return reply
