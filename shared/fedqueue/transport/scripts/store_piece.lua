-- Store a piece of an open attempt's payload, and renew the job's lease and the payload's expiry. A repeated piece
-- changes nothing. A piece that would leave a gap before it is not stored: the reply tells the worker where to continue.
-- KEYS[1]  job          hash {client, order}
-- KEYS[2]  attempt      hash {number, posted, lease, phase, ...}
-- KEYS[3...]            all chunks of the payload
-- ARGV[1]  number       of the attempt
-- ARGV[2]  lease_ms     length of the lease
-- ARGV[3]  expiry       seconds after which the payload expires unless it is posted
-- ARGV[4]  chunk_bytes  bytes of each chunk but the last
-- ARGV[5]  start        position of the piece in the payload, in bytes
-- ARGV[6]  piece        bytes within one chunk, or '' if the chunk travelled before this script
-- Returns the number of bytes that are stored without a gap, or -1 if the job is not open for this attempt.
local job_key, attempt_key = KEYS[1], KEYS[2]
local number, lease_ms, expiry, chunk_bytes, start, piece = unpack(ARGV)
local first_chunk = 3

local function stored_bytes()
  local stored = 0
  for i = first_chunk, #KEYS do
    local length = redis.call('STRLEN', KEYS[i])
    stored = stored + length
    if length < tonumber(chunk_bytes) then break end
  end
  return stored
end

local record = redis.call('HMGET', attempt_key, 'number', 'posted')
local open_number, posted = record[1], record[2]
local exists = redis.call('EXISTS', job_key) == 1
if not exists or open_number ~= number or posted then
  -- A repeated command may arrive after this attempt's post, whose payload must stay.
  local command = exists and open_number == number and 'PERSIST' or 'UNLINK'
  for i = first_chunk, #KEYS do redis.call(command, KEYS[i]) end
  return -1
end
local stored = stored_bytes()
if piece ~= '' and tonumber(start) <= stored then
  local chunk = math.floor(start / chunk_bytes)
  redis.call('SETRANGE', KEYS[first_chunk + chunk], start - chunk * chunk_bytes, piece)
  stored = stored_bytes()
end
for i = first_chunk, #KEYS do redis.call('EXPIRE', KEYS[i], expiry) end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', attempt_key, 'lease', now + lease_ms, 'phase', 'sending', 'stalled', 0)
return stored
