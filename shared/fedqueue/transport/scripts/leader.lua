-- Take, renew or release the lead of a run. Time is the server's, so clocks of machines do not matter.
-- KEYS[1]  leader   hash {token, owner, expires}
-- ARGV[1]  action   "take" | "renew" | "release"
-- ARGV[2]  owner    who asks (random, one per process)
-- ARGV[3]  lease    milliseconds
-- Returns the fencing token (it rises with each new leader), or 0 where another one leads.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local leader = redis.call('HMGET', KEYS[1], 'token', 'owner', 'expires')
local token = tonumber(leader[1] or '0')
local mine = leader[2] == ARGV[2]
if ARGV[1] == 'release' then
  if mine then redis.call('HSET', KEYS[1], 'owner', '', 'expires', 0) end
  return token
end
if not mine then
  if ARGV[1] == 'renew' then return 0 end
  if leader[2] and leader[2] ~= '' and tonumber(leader[3]) > now then return 0 end
  token = leader[1] and token + 1 or now  -- so that a server that has lost the run gives out no token again
end
redis.call('HSET', KEYS[1], 'token', token, 'owner', ARGV[2], 'expires', now + ARGV[3])
return token
