-- A worker says that it lives: its clients stay alive, and the leases of its jobs are renewed.
-- KEYS[1]  config
-- ARGV[1]  worker token, ARGV[2] lease (ms)
-- ARGV[3]  current   the job being trained on, or ''
-- ARGV[4]  number of the current job's attempt
-- ARGV[5]  progress  1 where the current job goes forward; 0: it has stalled, and its lease runs out
-- ARGV[6]  prefix of site keys, ARGV[7] of job keys, ARGV[8] of attempt keys (same slot)
-- ARGV[9…] clients
-- Returns {state of the run, 1 where the current job is still this attempt's, clients that are no longer ours…}.
--
-- A job that waits in the queue behind the current one has nobody else to renew it, so a busy worker does. An
-- idle worker takes a queued job at once: one that it does not take has been lost on the way, and its lease ends.
local time = redis.call('TIME')
local until_ms = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2]
local function open(job)
  return redis.call('EXISTS', ARGV[7] .. job) == 1 and not redis.call('HGET', ARGV[8] .. job, 'posted')
end
local answer = {redis.call('HGET', KEYS[1], 'state') or '', 0}
for i = 9, #ARGV do
  local client, site = ARGV[i], ARGV[6] .. ARGV[i]
  if redis.call('HGET', site, 'holder') == ARGV[1] then
    redis.call('HSET', site, 'alive', until_ms)
    local job = redis.call('HGET', site, 'job')
    if job and job ~= ARGV[3] and ARGV[3] ~= '' and open(job) then
      if redis.call('HGET', ARGV[8] .. job, 'holder') == ARGV[1] then
        redis.call('HSET', ARGV[8] .. job, 'lease', until_ms)
      end
    end
  else
    answer[#answer + 1] = client
  end
end
if ARGV[3] ~= '' and open(ARGV[3]) and redis.call('HGET', ARGV[8] .. ARGV[3], 'number') == ARGV[4] then
  answer[2] = 1
  if ARGV[5] == '1' then redis.call('HSET', ARGV[8] .. ARGV[3], 'lease', until_ms) end
end
return answer
