-- Let go of the base version once it is fetched, where the coordinator does not need it any more.
-- KEYS[1]  job, KEYS[2] attempt
-- ARGV[1]  number of the attempt
-- Returns 1, or 0 where the attempt does not hold the job any more.
local record = redis.call('HMGET', KEYS[2], 'number', 'posted')
if redis.call('EXISTS', KEYS[1]) == 0 or record[1] ~= ARGV[1] or record[2] then return 0 end
redis.call('HDEL', KEYS[2], 'held')
return 1
