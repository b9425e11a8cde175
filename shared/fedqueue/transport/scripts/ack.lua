-- Acknowledge an entry that ends no job (a registration, an evaluation, an invalid entry), and record it in the ledger.
-- KEYS[1]  leader     hash: its token must be the caller's
-- KEYS[2]  ledger     stream
-- KEYS[3]  stream     the stream of updates that contains the entry
-- KEYS[4]  counts     hash {rejected:REASON, evaluation, failure, ...}
-- ARGV[1]  token      the caller's fencing token
-- ARGV[2]  record     ledger record (msgpack), or '' for none
-- ARGV[3]  entry      position of the entry in its stream
-- ARGV[4]  counted    field of counts to increase, or ''
-- ARGV[5]  kept       field of counts that becomes the record, or ''
-- Returns 1; 0 if the entry was acknowledged before; -1 if another coordinator leads.
local leader_key, ledger_key, stream_key, counts_key = unpack(KEYS)
local token, record, entry, counted, kept = unpack(ARGV)

if redis.call('HGET', leader_key, 'token') ~= token then return -1 end
if redis.call('XDEL', stream_key, entry) == 0 then return 0 end
if record ~= '' then redis.call('XADD', ledger_key, '*', 'record', record) end
if counted ~= '' then redis.call('HINCRBY', counts_key, counted, 1) end
if kept ~= '' then redis.call('HSET', counts_key, kept, record) end
return 1
