-- Replace the run descriptor, which states what the run is and the term of its leader.
-- KEYS[1]  leader      hash: its token must be the caller's
-- KEYS[2]  config      hash {descriptor, ...}
-- ARGV[1]  token       the caller's fencing token
-- ARGV[2]  descriptor  signed
-- Returns 1, or -1 if another coordinator leads.
local leader_key, config_key = KEYS[1], KEYS[2]
local token, descriptor = ARGV[1], ARGV[2]

if redis.call('HGET', leader_key, 'token') ~= token then return -1 end
redis.call('HSET', config_key, 'descriptor', descriptor)
return 1
