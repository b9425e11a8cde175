-- End a job without merging it: rejected or abandoned. Its ledger entry, records, payload and stream entry change in
-- one step, so it ends exactly once.
-- KEYS[1]  leader    hash; its token must still be ours
-- KEYS[2]  job, KEYS[3] attempt, KEYS[4] jobs, KEYS[5] ledger, KEYS[6] the stream that the entry is in
-- ARGV[1]  fencing token, ARGV[2] job, ARGV[3] ledger record (msgpack)
-- ARGV[4]  entry     id in the stream to acknowledge (it is deleted), or ''
-- ARGV[5]  condition "lapsed": only while open with its lease over; "unposted": unless its update is there; "any"
-- ARGV[6]  prefix of the job's payload keys, ARGV[7] chunks of a payload, ARGV[8] prefix of site keys
-- ARGV[9]  most attempts, ARGV[10] most chunks that are looked for: an attempt's record is the worker's word
-- Returns 1 closed; 0 the condition does not hold, or the job had ended before; -1 another coordinator leads.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -1 end
local client = redis.call('HGET', KEYS[2], 'client')
local attempt = redis.call('HMGET', KEYS[3], 'number', 'posted', 'chunks', 'lease')
if ARGV[5] == 'lapsed' then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local lease = tonumber(attempt[4] or '')
  if attempt[2] or (lease and lease > now) then return 0 end
end
if ARGV[5] == 'unposted' and attempt[2] then return 0 end
if ARGV[4] ~= '' then redis.call('XDEL', KEYS[6], ARGV[4]) end
if not client then return 0 end
redis.call('XADD', KEYS[5], '*', 'record', ARGV[3])
redis.call('UNLINK', KEYS[2], KEYS[3])
redis.call('SREM', KEYS[4], ARGV[2])
if redis.call('HGET', ARGV[8] .. client, 'job') == ARGV[2] then redis.call('HDEL', ARGV[8] .. client, 'job') end
local attempts = math.min(tonumber(attempt[1] or '') or 0, tonumber(ARGV[9]))
local posted = math.min(tonumber(attempt[3] or '') or 0, tonumber(ARGV[10]))  -- a worker may have posted too many
for number = 1, attempts do
  for chunk = 0, math.max(tonumber(ARGV[7]), posted) - 1 do
    redis.call('UNLINK', ARGV[6] .. number .. ':' .. chunk)
  end
end
return 1
