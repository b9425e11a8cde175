-- Show a cohort to every keeper, and note that it is under way: a successor of this leader finishes exactly that one. A
-- cohort that was refused is replaced by the next one.
-- KEYS[1]  leader     hash: its token must be the caller's
-- KEYS[2]  cohort     the cohort under way
-- KEYS[3]  ledger     stream
-- KEYS[4...]          the stream of asks of each keeper
-- ARGV[1]  token      the caller's fencing token
-- ARGV[2]  cohort     msgpack, signed
-- ARGV[3]  record     the ledger's record of what the cohort spends (msgpack), or '' for none
-- Returns {1, position of the ask in each stream...}, or {-1} if another coordinator leads.
local leader_key, cohort_key, ledger_key = KEYS[1], KEYS[2], KEYS[3]
local token, cohort, record = ARGV[1], ARGV[2], ARGV[3]
local first_stream = 4

if redis.call('HGET', leader_key, 'token') ~= token then return {-1} end
redis.call('SET', cohort_key, cohort)
if record ~= '' then redis.call('XADD', ledger_key, '*', 'record', record) end
local reply = {1}
for i = first_stream, #KEYS do reply[#reply + 1] = redis.call('XADD', KEYS[i], '*', 'kind', 'cohort', 'body', cohort) end
return reply
