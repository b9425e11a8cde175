-- Expire a client whose worker's lease has ended, unless a worker has renewed it meanwhile.
-- KEYS[1]  site       hash of the client {holder, alive, ...}
-- Returns 1 if the client expired, else 0.
local site_key = KEYS[1]

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local alive_until = tonumber(redis.call('HGET', site_key, 'alive') or '')
if alive_until and alive_until > now then return 0 end
redis.call('HDEL', site_key, 'holder', 'alive')
return 1
