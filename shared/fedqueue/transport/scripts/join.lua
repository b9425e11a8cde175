-- Serve a client: the first of the candidates that no other living worker serves.
-- KEYS[1]  clients   set of the clients that the run knows
-- ARGV[1]  token     of the worker
-- ARGV[2]  lease     milliseconds
-- ARGV[3]  prefix    of site keys (same slot)
-- ARGV[4…] candidates
-- Returns the client, or false where every candidate is served by another living worker.
-- A worker whose Redis user is bound to one client has no right to add to the set: its client is there from the start.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = 4, #ARGV do
  local client = ARGV[i]
  local site = redis.call('HMGET', ARGV[3] .. client, 'holder', 'alive')
  local alive = tonumber(site[2] or '')
  if not site[1] or site[1] == ARGV[1] or not alive or alive <= now then
    redis.call('HSET', ARGV[3] .. client, 'holder', ARGV[1], 'alive', now + ARGV[2])
    if redis.call('SISMEMBER', KEYS[1], client) == 0 then redis.call('SADD', KEYS[1], client) end
    return client
  end
end
return false
