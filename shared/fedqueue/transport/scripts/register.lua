-- Say how many examples a client holds, and that it is ready for jobs.
-- KEYS[1]  site      hash of the client: {holder, registration, …}
-- KEYS[2]  updates   the client's stream
-- ARGV[1]  token, ARGV[2] registration (msgpack), ARGV[3] the wakeup channel
-- Returns 1, or 0 where another worker serves the client by now.
if redis.call('HGET', KEYS[1], 'holder') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'registration', ARGV[2])
redis.call('XADD', KEYS[2], '*', 'kind', 'joined', 'body', ARGV[2])
redis.call('PUBLISH', ARGV[3], KEYS[2])
return 1
