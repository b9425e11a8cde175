-- Put a job into its client's queue as RQ does, unless RQ knows it. These are RQ's keys: no others are touched.
-- KEYS[1]  RQ's record of the job, KEYS[2] RQ's queue of the client
-- ARGV[1]  job, ARGV[2…] fields of the record: name, value, …
-- Returns 1, or 0 where RQ knows the job: then nothing is changed.
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('RPUSH', KEYS[2], ARGV[1])
return 1
