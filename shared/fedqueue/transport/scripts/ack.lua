-- Append a record to the ledger (an evaluation, an unreadable entry), and acknowledge the entry it came from.
-- KEYS[1]  leader, KEYS[2] ledger, KEYS[3] the stream that the entry is in
-- ARGV[1]  fencing token, ARGV[2] ledger record (msgpack) or '', ARGV[3] entry
-- Returns 1; 0 where the entry had been acknowledged before; -1 where another coordinator leads.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -1 end
if redis.call('XDEL', KEYS[3], ARGV[3]) == 0 then return 0 end
if ARGV[2] ~= '' then redis.call('XADD', KEYS[2], '*', 'record', ARGV[2]) end
return 1
