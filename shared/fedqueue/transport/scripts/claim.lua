-- Begin an attempt at a job: number it, renew its lease, and mark the newest version as its base, so that the
-- version stays stored.
-- KEYS[1]  job        hash {client, order}: the coordinator's record
-- KEYS[2]  attempt    hash {number, holder, base, pinned, lease, phase, stalled, posted, chunks}: the worker's record
-- KEYS[3]  head       hash {version, ...}
-- KEYS[4]  config     hash {epoch, ...}
-- KEYS[5]  site       hash of the client, which counts refusals
-- ARGV[1]  worker     token of the worker process
-- ARGV[2]  lease_ms   length of the lease
-- Returns {attempt, version, epoch, client}, or false if the job is not open.
local job_key, attempt_key, head_key, config_key, site_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local worker, lease_ms = ARGV[1], ARGV[2]

local client = redis.call('HGET', job_key, 'client')
if not client or redis.call('HGET', attempt_key, 'posted') then
  if redis.call('EXISTS', site_key) == 1 then redis.call('HINCRBY', site_key, 'refused:closed', 1) end
  return false
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local number = redis.call('HINCRBY', attempt_key, 'number', 1)
local version = redis.call('HGET', head_key, 'version')
redis.call('HSET', attempt_key, 'holder', worker, 'base', version, 'pinned', 1, 'lease', now + lease_ms,
  'phase', 'fetching', 'stalled', 0)
return {number, tonumber(version), tonumber(redis.call('HGET', config_key, 'epoch') or '0'), client}
