-- Take a client whose aliveness is over off the list, unless it has come back.
-- KEYS[1]  site      hash of the client: {holder, alive, …}
-- Returns 1 where it was taken off.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local alive = tonumber(redis.call('HGET', KEYS[1], 'alive') or '')
if alive and alive > now then return 0 end
redis.call('HDEL', KEYS[1], 'holder', 'alive')
return 1
