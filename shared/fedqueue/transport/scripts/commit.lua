-- Make a version the head, together with the versions before it that were made at once and never stored. The chunks of
-- its model and of the server optimizer's state are staged before this script, under keys of this leader's own. So a
-- former leader that does not know it yet cannot overwrite its successor's version.
-- KEYS[1]  leader          hash: its token must be the caller's
-- KEYS[2]  head            hash {version, totals, state_chunks, token, commits_since_scan, ...}
-- KEYS[3]  versions        sorted set of the versions whose chunks are stored
-- KEYS[4]  ledger          stream
-- KEYS[5]  jobs            set of jobs that have not ended
-- KEYS[6]  pinned          set of versions that the coordinator keeps stored
-- KEYS[7]  counts          hash {merged:CLIENT, ...}
-- KEYS[8]  cohort          the cohort that the keepers released, if there is one: it is under way no longer
-- ARGV[1]  token           the caller's fencing token
-- ARGV[2]  version         the last of the versions made since the head, or 0 if there is no head
-- ARGV[3]  record_count    number of ledger records: one per version made since the head, none for version 0
-- ARGV[4]  totals          counters for recovery (msgpack)
-- ARGV[5]  job_prefix      of job keys (all prefixes: same slot)
-- ARGV[6]  payload_prefix  of payload keys
-- ARGV[7]  model_prefix    of model keys
-- ARGV[8]  state_prefix    of state keys
-- ARGV[9]  model_chunks    chunks of this version's model
-- ARGV[10] state_chunks    chunks of this version's optimizer state
-- ARGV[11] keep            '1': rename merged payloads to 'kept:...' after their prefix, out of reach of a late post
-- ARGV[12] attempt_prefix  of attempt keys
-- ARGV[13] updates_prefix  of streams of updates
-- ARGV[14] most_model_chunks    upper bound on the chunks of any version: compressed versions differ in size
-- ARGV[15] most_payload_chunks  upper bound on the chunks of any payload
-- ARGV[16] scan_limit      open jobs that one commit may scan for their bases. With more open jobs, only
--                          every n-th commit scans, so that n commits scan no more than n times this number
-- ARGV[17] mask_prefix     of keys with the masks of a cohort
-- ARGV[18] kept_prefix     of those with the masks of a merged cohort, which are kept as payloads are
-- ARGV[19] mask_chunks     chunks of the masks of one cohort
-- ARGV[20] mask_count      number of masks that the versions were made with
-- ARGV[21...]              the names of the masks after their prefix, then the ledger records (msgpack), then four
--                          values for each merged update: its stream's client, position in that stream, job, attempt
-- Returns {1, versions still stored...}; {0} if the head is not the version before these; {-1} if another coordinator
-- leads; {-2} if a staged chunk has expired. A repeated commit, after a lost reply, returns as the first one.
--
-- A version stays stored while it is the head, the marked base of an open job, or pinned.
local MOST_DEAD = 100  -- leaders between two commits whose staged chunks are deleted

local leader_key, head_key, versions_key, ledger_key, jobs_key, pinned_key, counts_key, cohort_key = unpack(KEYS)
local token, version_text, record_count, totals = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local job_prefix, payload_prefix, model_prefix, state_prefix = ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local model_chunks, state_chunks, keep = tonumber(ARGV[9]), tonumber(ARGV[10]), ARGV[11] == '1'
local attempt_prefix, updates_prefix = ARGV[12], ARGV[13]
local most_model_chunks, most_payload_chunks, scan_limit = tonumber(ARGV[14]), tonumber(ARGV[15]), ARGV[16]
local mask_prefix, kept_prefix, mask_chunks, mask_count = ARGV[17], ARGV[18], tonumber(ARGV[19]), tonumber(ARGV[20])
local first_mask, first_record = 21, 21 + mask_count
local first_merged = first_record + record_count
local version = tonumber(version_text)

local function each_staged_chunk(of_token, act)
  for _, blob in ipairs({{model_prefix, model_chunks}, {state_prefix, state_chunks}}) do
    local prefix, chunks = blob[1], blob[2]
    for chunk = 0, chunks - 1 do act(prefix .. 'staged:' .. of_token .. ':' .. chunk, prefix, chunk) end
  end
end

local function delete_chunks(prefix, chunks)
  for chunk = 0, chunks - 1 do redis.call('UNLINK', prefix .. ':' .. chunk) end
end

local function keep_or_delete(from, to)
  if keep and redis.call('EXISTS', from) == 1 then
    redis.call('RENAME', from, to)
    redis.call('PERSIST', to)
  else
    redis.call('UNLINK', from)
  end
end

if redis.call('HGET', leader_key, 'token') ~= token then return {-1} end
local last_commit = redis.call('HMGET', head_key, 'version', 'token')
local head, head_token = tonumber(last_commit[1] or '-1'), last_commit[2]
if head == version - math.max(1, record_count) then
  local complete = true
  each_staged_chunk(token, function(key) complete = complete and redis.call('EXISTS', key) == 1 end)
  if not complete then return {-2} end
  -- Leaders that died before their commit. After a deleted leader key the tokens have a gap: what older leaders staged
  -- expires by itself.
  for dead = math.max(tonumber(head_token or token), tonumber(token) - MOST_DEAD), tonumber(token) - 1 do
    each_staged_chunk(dead, function(key) redis.call('UNLINK', key) end)
  end
  each_staged_chunk(token, function(key, prefix, chunk)
    local committed_key = prefix .. version_text .. ':' .. chunk
    redis.call('RENAME', key, committed_key)
    redis.call('PERSIST', committed_key)
  end)
  redis.call('HSET', head_key, 'version', version, 'totals', totals, 'state_chunks', state_chunks, 'token', token)
  redis.call('ZADD', versions_key, version, version)
  for i = first_record, first_merged - 1 do redis.call('XADD', ledger_key, '*', 'record', ARGV[i]) end
  for i = first_merged, #ARGV, 4 do
    local client, entry, job, attempt = unpack(ARGV, i, i + 3)
    redis.call('XDEL', updates_prefix .. client, entry)
    redis.call('UNLINK', job_prefix .. job, attempt_prefix .. job)
    redis.call('SREM', jobs_key, job)
    redis.call('HINCRBY', counts_key, 'merged:' .. client, 1)
    for chunk = 0, most_payload_chunks - 1 do
      local name = job .. ':' .. attempt .. ':' .. chunk
      keep_or_delete(payload_prefix .. name, payload_prefix .. 'kept:' .. name)
    end
  end
  for i = first_mask, first_record - 1 do
    redis.call('UNLINK', cohort_key)
    for chunk = 0, mask_chunks - 1 do
      local name = ARGV[i] .. ':' .. chunk
      keep_or_delete(mask_prefix .. name, kept_prefix .. name)
    end
  end
elseif head ~= version or head_token ~= token then
  return {0}
end  -- else: this very commit, repeated because its reply was lost

local in_use = {}
local commits_since_scan = redis.call('HINCRBY', head_key, 'commits_since_scan', 1)
local scans = commits_since_scan * scan_limit >= redis.call('SCARD', jobs_key)
if scans then
  redis.call('HDEL', head_key, 'commits_since_scan')
  for _, pinned in ipairs(redis.call('SMEMBERS', pinned_key)) do in_use[pinned] = true end
  for _, job in ipairs(redis.call('SMEMBERS', jobs_key)) do
    local attempt = redis.call('HMGET', attempt_prefix .. job, 'pinned', 'base')
    local pins_base, base = attempt[1], attempt[2]
    if pins_base and base then in_use[base] = true end
  end
end
local reply = {1}
for _, stored in ipairs(redis.call('ZRANGE', versions_key, 0, -1)) do
  local is_head = tonumber(stored) == version
  if not is_head then delete_chunks(state_prefix .. stored, state_chunks) end
  if is_head or in_use[stored] or not scans then
    reply[#reply + 1] = tonumber(stored)
  else
    redis.call('ZREM', versions_key, stored)
    delete_chunks(model_prefix .. stored, most_model_chunks)
  end
end
return reply
