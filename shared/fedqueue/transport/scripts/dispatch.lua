-- Open a job for a client, with a lease. Repeating it changes nothing.
-- KEYS[1]  leader     hash: its token must be the caller's
-- KEYS[2]  job        hash {client, order}: only a coordinator writes it
-- KEYS[3]  attempt    hash {number, holder, base, pinned, lease, posted, chunks}: the worker's record from here on
-- KEYS[4]  jobs       set of jobs that have not ended
-- KEYS[5]  site       hash of the client {holder, job, ...}
-- KEYS[6]  head       hash {job_number, ...}
-- KEYS[7]  clients    set of the clients whose streams the coordinator reads
-- KEYS[8]  last_jobs  hash: client -> number of its last job
-- ARGV[1]  token      the caller's fencing token
-- ARGV[2]  job        name of the job
-- ARGV[3]  client
-- ARGV[4]  order      msgpack, signed in a signed run
-- ARGV[5]  lease_ms   length of the lease
-- ARGV[6]  number     number of the job; it rises with each job of the run
-- Returns 1, or -1 if another coordinator leads.
local leader_key, job_key, attempt_key, jobs_key, site_key, head_key, clients_key, last_jobs_key = unpack(KEYS)
local token, job, client, order, lease_ms, number = unpack(ARGV)

if redis.call('HGET', leader_key, 'token') ~= token then return -1 end
if redis.call('EXISTS', job_key) == 1 then return 1 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local holder = redis.call('HGET', site_key, 'holder') or ''
redis.call('UNLINK', attempt_key)  -- a worker may have written this key before the job existed
redis.call('HSET', job_key, 'client', client, 'order', order)
redis.call('HSET', attempt_key, 'number', 0, 'holder', holder, 'base', -1, 'lease', now + lease_ms)
redis.call('SADD', jobs_key, job)
redis.call('HSET', site_key, 'job', job)
redis.call('SADD', clients_key, client)
redis.call('HSET', head_key, 'job_number', number)
redis.call('HSET', last_jobs_key, client, number)
return 1
