-- Take, renew or release the leader lease of a run. Time is the server's, so clocks of other machines do not matter.
-- KEYS[1]  leader     hash {token, owner, expires, waiting}
-- ARGV[1]  action     'take' | 'renew' | 'release'
-- ARGV[2]  owner      name of the coordinator process (random)
-- ARGV[3]  lease_ms   length of the lease
-- ARGV[4]  waiting    what keeps the run from going on; left out: unchanged
-- Returns the fencing token, which rises with each new leader, or 0 if another coordinator leads.
local leader_key = KEYS[1]
local action, owner, lease_ms, waiting = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local leader = redis.call('HMGET', leader_key, 'token', 'owner', 'expires')
local last_token, last_owner, expires = leader[1], leader[2], leader[3]
local token = tonumber(last_token or '0')
local is_owner = last_owner == owner
if action == 'release' then
  if is_owner then redis.call('HSET', leader_key, 'owner', '', 'expires', 0) end
  return token
end
if not is_owner then
  if action == 'renew' then return 0 end
  if last_owner and last_owner ~= '' and tonumber(expires) > now then return 0 end
  -- The first token is the time in ms: a server that has lost the run issues no token a second time.
  token = last_token and token + 1 or now
end
redis.call('HSET', leader_key, 'token', token, 'owner', owner, 'expires', now + lease_ms)
if waiting then redis.call('HSET', leader_key, 'waiting', waiting) end
return token
