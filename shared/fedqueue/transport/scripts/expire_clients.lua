-- Expire the clients whose worker's lease has ended, unless a worker has renewed it meanwhile.
-- KEYS[1], KEYS[2] and so on   for each client, its hash {holder, alive, ...}
-- Returns for each client 1 if it expired, else 0.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply = {}
for i, site_key in ipairs(KEYS) do
  local alive_until = tonumber(redis.call('HGET', site_key, 'alive') or '')
  if alive_until and alive_until > now then
    reply[i] = 0
  else
    redis.call('HDEL', site_key, 'holder', 'alive')
    reply[i] = 1
  end
end
return reply
