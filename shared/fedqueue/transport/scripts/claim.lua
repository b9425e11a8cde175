-- Begin an attempt at a job: number it, renew the lease, and hold the newest version so that it is not deleted.
-- KEYS[1]  job      hash {client, order}: the coordinator's own record
-- KEYS[2]  attempt  hash {number, holder, base, held, lease, posted, chunks}: the worker's record
-- KEYS[3]  head     hash {version, …}
-- KEYS[4]  config   hash {epoch, …}
-- KEYS[5]  site     hash of the client, where a refusal is counted
-- ARGV[1]  worker token, ARGV[2] lease (ms)
-- Returns {attempt, version, epoch, client}, or false where the job is closed.
local client = redis.call('HGET', KEYS[1], 'client')
if not client or redis.call('HGET', KEYS[2], 'posted') then
  if redis.call('EXISTS', KEYS[5]) == 1 then redis.call('HINCRBY', KEYS[5], 'refused:closed', 1) end
  return false
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local attempt = redis.call('HINCRBY', KEYS[2], 'number', 1)
local version = redis.call('HGET', KEYS[3], 'version')
redis.call('HSET', KEYS[2], 'holder', ARGV[1], 'base', version, 'held', 1, 'lease', now + ARGV[2])
return {attempt, tonumber(version), tonumber(redis.call('HGET', KEYS[4], 'epoch') or '0'), client}
