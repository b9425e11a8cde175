-- Release a client, and report why: its worker left, or cannot load the client's data.
-- KEYS[1]  site       hash of the client {holder, alive, ...}
-- KEYS[2]  updates    the client's stream
-- ARGV[1]  worker     token of the worker process
-- ARGV[2]  kind       'left' | 'unavailable'
-- ARGV[3]  body       of the entry: signed in a signed run
-- ARGV[4]  wakeup     channel on which the stream's name is published
-- Returns 1, or 0 if another worker serves the client.
local site_key, updates_key = KEYS[1], KEYS[2]
local worker, kind, body, wakeup = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

if redis.call('HGET', site_key, 'holder') ~= worker then return 0 end
redis.call('HDEL', site_key, 'holder', 'alive')
redis.call('XADD', updates_key, '*', 'kind', kind, 'body', body)
redis.call('PUBLISH', wakeup, updates_key)
return 1
