-- Register a client: its number of examples, and that it is ready for jobs.
-- KEYS[1]  site          hash of the client {holder, registration, ...}
-- KEYS[2]  updates       the client's stream
-- ARGV[1]  worker        token of the worker process
-- ARGV[2]  registration  msgpack, signed in a signed run
-- ARGV[3]  wakeup        channel on which the stream's name is published
-- Returns 1, or 0 if another worker serves the client.
local site_key, updates_key = KEYS[1], KEYS[2]
local worker, registration, wakeup = ARGV[1], ARGV[2], ARGV[3]

if redis.call('HGET', site_key, 'holder') ~= worker then return 0 end
redis.call('HSET', site_key, 'registration', registration)
redis.call('XADD', updates_key, '*', 'kind', 'joined', 'body', registration)
redis.call('PUBLISH', wakeup, updates_key)
return 1
