-- End a job without merging it, as rejected or abandoned. The ledger, the job's records, its payload and its stream
-- entry change in one step, so a job ends exactly once.
-- KEYS[1]  leader          hash: its token must be the caller's
-- KEYS[2]  job             hash {client, order}
-- KEYS[3]  attempt         hash {number, posted, chunks, lease, ...}
-- KEYS[4]  jobs            set of jobs that have not ended
-- KEYS[5]  ledger          stream
-- KEYS[6]  stream          the stream of updates that contains the entry
-- KEYS[7]  counts          hash {rejected:REASON, abandoned:REASON, failure, ...}
-- ARGV[1]  token           the caller's fencing token
-- ARGV[2]  job             name of the job
-- ARGV[3]  record          ledger record (msgpack)
-- ARGV[4]  entry           position in the stream of the entry to acknowledge, or ''
-- ARGV[5]  condition       'lapsed': only if the job is not posted and its lease has ended
--                          'unposted': only if the job is not posted
--                          'any': always
-- ARGV[6]  payload_prefix  of the job's payload keys
-- ARGV[7]  payload_chunks  chunks of a payload of this run
-- ARGV[8]  site_prefix     of site keys (same slot)
-- ARGV[9]  most_attempts   upper bounds on the payload keys to delete, because a worker writes the
-- ARGV[10] most_chunks     numbers in the attempt's record
-- ARGV[11] counted         field of counts to increase, or ''
-- ARGV[12] kept            field of counts that becomes the record, or ''
-- ARGV[13] client          of the job, for a job whose lease has ended and whose record Redis has deleted to free memory
-- Returns 1; 0 if the condition is not met, or the job had ended before; -1 if another coordinator leads.
local leader_key, job_key, attempt_key, jobs_key, ledger_key, stream_key, counts_key = unpack(KEYS)
local token, job, record, entry, condition, payload_prefix, payload_chunks, site_prefix = unpack(ARGV, 1, 8)
local most_attempts, most_chunks = tonumber(ARGV[9]), tonumber(ARGV[10])
local counted, kept = ARGV[11], ARGV[12]

if redis.call('HGET', leader_key, 'token') ~= token then return -1 end
local client = redis.call('HGET', job_key, 'client')
  or condition == 'lapsed' and redis.call('SISMEMBER', jobs_key, job) == 1 and ARGV[13]
local attempt = redis.call('HMGET', attempt_key, 'number', 'posted', 'chunks', 'lease', 'holder')
local number, posted, chunks, lease, holder = unpack(attempt, 1, 5)
if condition == 'lapsed' then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local lease_end = tonumber(lease or '')
  local served_by = client and redis.call('HGET', site_prefix .. client, 'holder')
  local is_replaced = (tonumber(number or '') or 0) > 0 and served_by and served_by ~= holder
  if posted or (lease_end and lease_end > now and not is_replaced) then return 0 end
end
if condition == 'unposted' and posted then return 0 end
if entry ~= '' then redis.call('XDEL', stream_key, entry) end
if not client then return 0 end
redis.call('XADD', ledger_key, '*', 'record', record)
if counted ~= '' then redis.call('HINCRBY', counts_key, counted, 1) end
if kept ~= '' then redis.call('HSET', counts_key, kept, record) end
redis.call('UNLINK', job_key, attempt_key)
redis.call('SREM', jobs_key, job)
local site_key = site_prefix .. client
if redis.call('HGET', site_key, 'job') == job then redis.call('HDEL', site_key, 'job') end
local attempts = math.min(tonumber(number or '') or 0, most_attempts)
local posted_chunks = math.min(tonumber(chunks or '') or 0, most_chunks)  -- may exceed a payload's chunks
for attempt_number = 1, attempts do
  for chunk = 0, math.max(tonumber(payload_chunks), posted_chunks) - 1 do
    redis.call('UNLINK', payload_prefix .. attempt_number .. ':' .. chunk)
  end
end
return 1
