-- Stop serving a client, politely.
-- KEYS[1]  site      hash of the client: {holder, alive, …}
-- KEYS[2]  updates   the client's stream
-- ARGV[1]  token of the worker, ARGV[2] what it says (signed, or empty), ARGV[3] the wakeup channel
-- Returns 1 where this worker still held it, else 0.
if redis.call('HGET', KEYS[1], 'holder') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], 'holder', 'alive')
redis.call('XADD', KEYS[2], '*', 'kind', 'left', 'body', ARGV[2])
redis.call('PUBLISH', ARGV[3], KEYS[2])
return 1
