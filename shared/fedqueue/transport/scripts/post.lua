-- Report the end of an attempt: an update whose payload is already stored, or a job handed back or failed.
-- KEYS[1]  job       hash {client, order}: the coordinator's own record
-- KEYS[2]  attempt   hash {number, base, posted, chunks, …}
-- KEYS[3]  site      hash of the client {job, refused:REASON, …}
-- KEYS[4]  updates   the client's stream
-- KEYS[5]  config    hash {epoch, …}
-- KEYS[6…] the chunks of the payload (none for an ending)
-- ARGV[1]  job, ARGV[2] number of the attempt, ARGV[3] kind ("update" | "ended"), ARGV[4] body (msgpack)
-- ARGV[5]  epoch     in which the job was claimed
-- ARGV[6]  wakeup      the channel on which the stream's name is published
-- Returns "" where it was appended, or the reason why it was refused: closed, replayed, attempt, payload, old_epoch.
-- A refused update's payload is deleted, but for a replayed one's: that is the payload of the update which was
-- appended. What the entry says of the base is the record's, and its client is the stream's.
local function refuse(reason)
  if redis.call('EXISTS', KEYS[3]) == 1 then redis.call('HINCRBY', KEYS[3], 'refused:' .. reason, 1) end
  return reason
end
local there = redis.call('EXISTS', KEYS[1]) == 1
local record = redis.call('HMGET', KEYS[2], 'posted', 'number', 'base')
if there and record[1] and record[2] == ARGV[2] then
  for i = 6, #KEYS do redis.call('PERSIST', KEYS[i]) end  -- it may have been written again, with an expiry
  return refuse('replayed')
end
local epoch = redis.call('HGET', KEYS[5], 'epoch') or '0'
local open = there and not record[1]
local why = open and 'attempt' or 'closed'
local good = open and record[2] == ARGV[2]
if epoch ~= ARGV[5] then good, why = false, 'old_epoch' end
for i = 6, #KEYS do
  if good and redis.call('EXISTS', KEYS[i]) == 0 then good, why = false, 'payload' end
end
if not good then
  for i = 6, #KEYS do redis.call('UNLINK', KEYS[i]) end
  return refuse(why)
end
for i = 6, #KEYS do redis.call('PERSIST', KEYS[i]) end
redis.call('HSET', KEYS[2], 'posted', 1, 'chunks', #KEYS - 5)
if redis.call('HGET', KEYS[3], 'job') == ARGV[1] then redis.call('HDEL', KEYS[3], 'job') end
redis.call('XADD', KEYS[4], '*', 'kind', ARGV[3], 'job', ARGV[1], 'attempt', ARGV[2], 'base', record[3],
           'body', ARGV[4])
redis.call('PUBLISH', ARGV[6], KEYS[4])
return ''
