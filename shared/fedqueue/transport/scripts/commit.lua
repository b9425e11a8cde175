-- Make a version the newest one, and record those before it that nobody could see and that were never stored. Its
-- chunks (and the server optimizer's) have been staged before, under keys of this
-- leader's own: so a leader that has lost the lead without knowing it cannot overwrite a version of its successor.
-- KEYS[1]  leader, KEYS[2] head, KEYS[3] versions, KEYS[4] ledger, KEYS[5] jobs, KEYS[6] pinned
-- ARGV[1]  fencing token
-- ARGV[2]  version   the last of those that were made since the head (or 0 where there is no head)
-- ARGV[3]  records   how many ledger records follow: one for each of these versions; none for version 0
-- ARGV[4]  totals    msgpack, what a successor needs to go on counting
-- ARGV[5]  prefix of job keys, ARGV[6] of payload keys, ARGV[7] of model keys, ARGV[8] of state keys
-- ARGV[9]  chunks of a model, ARGV[10] chunks of the optimizer's state
-- ARGV[11] keep      1: merged payloads are moved to "kept:" of their prefix, where no late post of a worker reaches them
-- ARGV[12] prefix of attempt keys, ARGV[13] of streams
-- ARGV[14] most chunks that a version may have, ARGV[15] or the payload of an update: compressed ones differ in size
-- ARGV[16] how many open jobs may be asked what they hold at each commit; n times as many are at every n-th
-- ARGV[17…] the ledger records (msgpack); then for each merged update: its stream's client, entry id, job, attempt
-- Returns {1, versions still stored…}, {0} where the head is not what was expected, {-1} where another one leads,
-- {-2} where a staged chunk is gone.
-- A version stays stored while it is the head, some open job holds it as its base, or the coordinator itself does. Where
-- many jobs are open, which of the older ones nobody holds is found out later, so that a commit does not cost more.
local blobs = {{ARGV[7], tonumber(ARGV[9])}, {ARGV[8], tonumber(ARGV[10])}}
local function each_staged(token, act)
  for _, blob in ipairs(blobs) do
    for chunk = 0, blob[2] - 1 do act(blob[1] .. 'staged:' .. token .. ':' .. chunk, blob[1], chunk) end
  end
end
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return {-1} end
local version, records = tonumber(ARGV[2]), tonumber(ARGV[3])
local last = redis.call('HMGET', KEYS[2], 'version', 'token')
local head = tonumber(last[1] or '-1')
if head == version - math.max(1, records) then
  local whole = true
  each_staged(ARGV[1], function(key) whole = whole and redis.call('EXISTS', key) == 1 end)
  if not whole then return {-2} end
  for token = tonumber(last[2] or ARGV[1]), tonumber(ARGV[1]) - 1 do  -- of leaders that died before their commit
    each_staged(token, function(key) redis.call('UNLINK', key) end)
  end
  each_staged(ARGV[1], function(key, prefix, chunk)
    local place = prefix .. ARGV[2] .. ':' .. chunk
    redis.call('RENAME', key, place)
    redis.call('PERSIST', place)
  end)
  redis.call('HSET', KEYS[2], 'version', version, 'totals', ARGV[4], 'state_chunks', ARGV[10], 'token', ARGV[1])
  redis.call('ZADD', KEYS[3], version, version)
  for i = 17, 16 + records do redis.call('XADD', KEYS[4], '*', 'record', ARGV[i]) end
  for i = 17 + records, #ARGV, 4 do
    local client, entry, job, attempt = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
    redis.call('XDEL', ARGV[13] .. client, entry)
    redis.call('UNLINK', ARGV[5] .. job, ARGV[12] .. job)
    redis.call('SREM', KEYS[5], job)
    for chunk = 0, tonumber(ARGV[15]) - 1 do
      local name = job .. ':' .. attempt .. ':' .. chunk
      if ARGV[11] == '1' and redis.call('EXISTS', ARGV[6] .. name) == 1 then
        redis.call('RENAME', ARGV[6] .. name, ARGV[6] .. 'kept:' .. name)
      else
        redis.call('UNLINK', ARGV[6] .. name)
      end
    end
  end
elseif head ~= version or last[2] ~= ARGV[1] then
  return {0}
end  -- else: this very commit, repeated because its answer was lost
local held = {}
local looks = redis.call('HINCRBY', KEYS[2], 'unlooked', 1) * ARGV[16] >= redis.call('SCARD', KEYS[5])
if looks then
  redis.call('HDEL', KEYS[2], 'unlooked')
  for _, base in ipairs(redis.call('SMEMBERS', KEYS[6])) do held[base] = true end
  for _, job in ipairs(redis.call('SMEMBERS', KEYS[5])) do
    local attempt = redis.call('HMGET', ARGV[12] .. job, 'held', 'base')
    if attempt[1] and attempt[2] then held[attempt[2]] = true end
  end
end
local stored = {1}
for _, old in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  if tonumber(old) ~= version then
    for chunk = 0, tonumber(ARGV[10]) - 1 do redis.call('UNLINK', ARGV[8] .. old .. ':' .. chunk) end
  end
  if tonumber(old) == version or held[old] or not looks then
    stored[#stored + 1] = tonumber(old)
  else
    redis.call('ZREM', KEYS[3], old)
    for chunk = 0, tonumber(ARGV[14]) - 1 do redis.call('UNLINK', ARGV[7] .. old .. ':' .. chunk) end
  end
end
return stored
