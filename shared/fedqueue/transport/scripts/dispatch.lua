-- Open a job for a client, with a lease.
-- KEYS[1]  leader    hash; its token must still be ours
-- KEYS[2]  job       hash {client, order}: only a coordinator writes it
-- KEYS[3]  attempt   hash {number, holder, base, held, lease, posted, chunks}: its worker goes on with it
-- KEYS[4]  jobs      set of jobs
-- KEYS[5]  site      hash of the client {holder, job, …}
-- KEYS[6]  head      hash; job_number rises with each job
-- KEYS[7]  clients   set of the clients whose streams are read
-- KEYS[8]  turns     hash client -> number of its last job
-- ARGV[1]  fencing token, ARGV[2] job, ARGV[3] client, ARGV[4] order (msgpack), ARGV[5] lease (ms), ARGV[6] number
-- Returns 1, or -1 where another coordinator leads. Repeating it changes nothing.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -1 end
if redis.call('EXISTS', KEYS[2]) == 1 then return 1 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local holder = redis.call('HGET', KEYS[5], 'holder') or ''
redis.call('UNLINK', KEYS[3])  -- a worker may have written there before the job was
redis.call('HSET', KEYS[2], 'client', ARGV[3], 'order', ARGV[4])
redis.call('HSET', KEYS[3], 'number', 0, 'holder', holder, 'base', -1, 'lease', now + ARGV[5])
redis.call('SADD', KEYS[4], ARGV[2])
redis.call('HSET', KEYS[5], 'job', ARGV[2])
redis.call('SADD', KEYS[7], ARGV[3])
redis.call('HSET', KEYS[6], 'job_number', ARGV[6])
redis.call('HSET', KEYS[8], ARGV[3], ARGV[6])
return 1
