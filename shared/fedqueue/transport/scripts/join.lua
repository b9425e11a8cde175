-- Serve a client: the first of the candidates that no other living worker serves.
-- KEYS[1]  clients      set of the clients that the run knows
-- ARGV[1]  worker       token of the worker process
-- ARGV[2]  lease_ms     length of the worker's lease on the client
-- ARGV[3]  site_prefix  of site keys (same slot)
-- ARGV[4...]            candidates
-- Returns the client, or false if another living worker serves each candidate.
--
-- A worker whose Redis user is bound to one client has no right to add to the set. Its client is in the set from the
-- start of the run.
local clients_key = KEYS[1]
local worker, lease_ms, site_prefix = ARGV[1], ARGV[2], ARGV[3]
local first_candidate = 4

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = first_candidate, #ARGV do
  local client = ARGV[i]
  local site_key = site_prefix .. client
  local site = redis.call('HMGET', site_key, 'holder', 'alive')
  local holder, alive_until = site[1], tonumber(site[2] or '')
  if not holder or holder == worker or not alive_until or alive_until <= now then
    redis.call('HSET', site_key, 'holder', worker, 'alive', now + lease_ms)
    if redis.call('SISMEMBER', clients_key, client) == 0 then redis.call('SADD', clients_key, client) end
    return client
  end
end
return false
