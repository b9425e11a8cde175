-- Show a cohort to every keeper, and note that it is under way: a successor of this leader finishes exactly that one. A
-- cohort that was refused is replaced by the next one.
-- KEYS[1]  leader     hash: its token must be the caller's
-- KEYS[2]  cohort     the cohort under way
-- KEYS[3...]          the stream of asks of each keeper
-- ARGV[1]  token      the caller's fencing token
-- ARGV[2]  cohort     msgpack, signed
-- Returns {1, position of the ask in each stream...}, or {-1} if another coordinator leads.
local leader_key, cohort_key = KEYS[1], KEYS[2]
local token, cohort = ARGV[1], ARGV[2]
local first_stream = 3

if redis.call('HGET', leader_key, 'token') ~= token then return {-1} end
redis.call('SET', cohort_key, cohort)
local reply = {1}
for i = first_stream, #KEYS do reply[#reply + 1] = redis.call('XADD', KEYS[i], '*', 'kind', 'cohort', 'body', cohort) end
return reply
