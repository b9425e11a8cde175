-- Mark the run as ended, and delete what only a running one needs: its working keys, and each version that is stored
-- still because a job, closed by now, had it as its base.
-- KEYS[1]  leader, KEYS[2] config, KEYS[3] head, KEYS[4] versions, KEYS[5] clients, KEYS[6…] the working keys
-- ARGV[1]  fencing token, ARGV[2] why it ended, ARGV[3] prefix of model keys, ARGV[4] chunks of a model
-- ARGV[5]  prefix of site keys (their registrations and counts stay), ARGV[6] of streams
-- ARGV[7…] versions that stay beside the head
-- Returns 1, or -1 where another coordinator leads. Repeating it changes nothing.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -1 end
redis.call('HSET', KEYS[2], 'state', 'ended', 'stopped_because', ARGV[2])
local stays = {[redis.call('HGET', KEYS[3], 'version')] = true}
for i = 7, #ARGV do stays[ARGV[i]] = true end
for _, version in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
  if not stays[version] then
    redis.call('ZREM', KEYS[4], version)
    for chunk = 0, tonumber(ARGV[4]) - 1 do redis.call('UNLINK', ARGV[3] .. version .. ':' .. chunk) end
  end
end
for _, client in ipairs(redis.call('SMEMBERS', KEYS[5])) do
  redis.call('HDEL', ARGV[5] .. client, 'holder', 'alive', 'job')
  redis.call('UNLINK', ARGV[6] .. client)
end
redis.call('UNLINK', ARGV[6])  -- the coordinator's own
for i = 6, #KEYS do redis.call('UNLINK', KEYS[i]) end
return 1
