-- Say what a run is and under which term its leader goes on.
-- KEYS[1]  leader, KEYS[2] config (hash)
-- ARGV[1]  fencing token, ARGV[2] run descriptor (sealed)
-- Returns 1, or -1 where another coordinator leads.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -1 end
redis.call('HSET', KEYS[2], 'descriptor', ARGV[2])
return 1
