-- Let the base version be deleted after its download, if the coordinator does not need it for the merge.
-- KEYS[1]  job        hash {client, order}
-- KEYS[2]  attempt    hash {number, posted, pinned, ...}
-- ARGV[1]  number     of the attempt
-- Returns 1, or 0 if the job is not open for this attempt.
local job_key, attempt_key = KEYS[1], KEYS[2]
local number = ARGV[1]

local record = redis.call('HMGET', attempt_key, 'number', 'posted')
local open_number, posted = record[1], record[2]
if redis.call('EXISTS', job_key) == 0 or open_number ~= number or posted then return 0 end
redis.call('HDEL', attempt_key, 'pinned')
return 1
