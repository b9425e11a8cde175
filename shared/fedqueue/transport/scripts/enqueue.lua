-- Put a job into its client's queue as RQ does, unless RQ has a record of it. It touches RQ's keys only.
-- KEYS[1]  record     RQ's record of the job (hash)
-- KEYS[2]  queue      RQ's queue of the client (list)
-- ARGV[1]  job        name of the job
-- ARGV[2...]          fields of the record: name, value, name, value, ...
-- Returns 1, or 0 if RQ has a record of the job; then nothing changes.
local record_key, queue_key = KEYS[1], KEYS[2]
local job = ARGV[1]

if redis.call('EXISTS', record_key) == 1 then return 0 end
redis.call('HSET', record_key, unpack(ARGV, 2))
redis.call('RPUSH', queue_key, job)
return 1
