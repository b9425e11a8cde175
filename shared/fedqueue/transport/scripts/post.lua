-- Report the end of an attempt: an update whose payload is already stored, or a job that was handed back or failed.
-- KEYS[1]  job        hash {client, order}: the coordinator's record
-- KEYS[2]  attempt    hash {number, base, posted, chunks, ...}: the worker's record
-- KEYS[3]  site       hash of the client {job, refused:REASON, ...}
-- KEYS[4]  updates    the client's stream
-- KEYS[5]  config     hash {epoch, ...}
-- KEYS[6...]          the chunks of the payload (none for an ending)
-- ARGV[1]  job        name of the job
-- ARGV[2]  number     of the attempt
-- ARGV[3]  kind       'update' | 'ended'
-- ARGV[4]  body       msgpack, signed in a signed run
-- ARGV[5]  epoch      in which the job was claimed
-- ARGV[6]  wakeup     channel on which the stream's name is published
-- Returns '' if the entry was appended, else the reason for the refusal (PostResult): 'closed', 'replayed',
-- 'attempt', 'payload' or 'old_epoch'.
--
-- The payload of a refused update is deleted. The payload of a replayed update is kept, because it belongs to the
-- entry that was appended before. The entry's base comes from the attempt's record, and its client from the stream.
local job_key, attempt_key, site_key, updates_key, config_key = unpack(KEYS, 1, 5)
local job, number, kind, body, epoch, wakeup = unpack(ARGV)
local first_chunk = 6

local function refuse(reason)
  if redis.call('EXISTS', site_key) == 1 then redis.call('HINCRBY', site_key, 'refused:' .. reason, 1) end
  return reason
end
local function each_chunk(command)
  for i = first_chunk, #KEYS do redis.call(command, KEYS[i]) end
end

local exists = redis.call('EXISTS', job_key) == 1
local record = redis.call('HMGET', attempt_key, 'posted', 'number', 'base')
local posted, open_number, base = record[1], record[2], record[3]
if exists and posted and open_number == number then
  each_chunk('PERSIST')  -- the payload may have been written again, with an expiry
  return refuse('replayed')
end
local run_epoch = redis.call('HGET', config_key, 'epoch') or '0'
local is_open = exists and not posted
local reason = is_open and 'attempt' or 'closed'
local accepted = is_open and open_number == number
if run_epoch ~= epoch then accepted, reason = false, 'old_epoch' end
for i = first_chunk, #KEYS do
  if accepted and redis.call('EXISTS', KEYS[i]) == 0 then accepted, reason = false, 'payload' end
end
if not accepted then
  each_chunk('UNLINK')
  return refuse(reason)
end
each_chunk('PERSIST')
redis.call('HSET', attempt_key, 'posted', 1, 'chunks', #KEYS - first_chunk + 1)
if redis.call('HGET', site_key, 'job') == job then redis.call('HDEL', site_key, 'job') end
redis.call('XADD', updates_key, '*', 'kind', kind, 'job', job, 'attempt', number, 'base', base, 'body', body)
redis.call('PUBLISH', wakeup, updates_key)
return ''
