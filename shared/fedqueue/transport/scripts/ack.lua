-- Acknowledge entries that end no job (registrations, an evaluation, invalid entries), and record them in the ledger.
-- KEYS[1]  leader     hash: its token must be the caller's
-- KEYS[2]  ledger     stream
-- KEYS[3]  counts     hash {rejected:REASON, evaluation, failure, ...}
-- KEYS[4...]          for each entry, the stream of updates that contains it
-- ARGV[1]  token      the caller's fencing token
-- ARGV[2...]          four values for each entry: its position in its stream; its ledger record (msgpack), or '' for
--                     none; the field of counts to increase, or ''; the field of counts that becomes the record, or ''
-- Returns the number of entries that were not acknowledged before; -1 if another coordinator leads. An entry that was
-- acknowledged before is not recorded again.
local leader_key, ledger_key, counts_key = KEYS[1], KEYS[2], KEYS[3]
local token = ARGV[1]
local first_stream, first_entry = 4, 2

if redis.call('HGET', leader_key, 'token') ~= token then return -1 end
local acknowledged = 0
for i = first_stream, #KEYS do
  local first = first_entry + 4 * (i - first_stream)
  local entry, record, counted, kept = unpack(ARGV, first, first + 3)
  if redis.call('XDEL', KEYS[i], entry) == 1 then
    acknowledged = acknowledged + 1
    if record ~= '' then redis.call('XADD', ledger_key, '*', 'record', record) end
    if counted ~= '' then redis.call('HINCRBY', counts_key, counted, 1) end
    if kept ~= '' then redis.call('HSET', counts_key, kept, record) end
  end
end
return acknowledged
