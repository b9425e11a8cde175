-- Mark the run as ended. Delete its working keys, and each version that is still stored only because a job, closed by
-- now, had it as its base. Repeating it changes nothing.
-- KEYS[1]  leader          hash: its token must be the caller's
-- KEYS[2]  config          hash {state, stopped_because, ...}
-- KEYS[3]  head            hash {version, ...}
-- KEYS[4]  versions        sorted set of the versions whose chunks are stored
-- KEYS[5]  clients         set of clients
-- KEYS[6...]               the working keys to delete
-- ARGV[1]  token           the caller's fencing token
-- ARGV[2]  because         why the run ended
-- ARGV[3]  failed          '1' if it ended as failed
-- ARGV[4]  model_prefix    of model keys (all prefixes: same slot)
-- ARGV[5]  model_chunks    upper bound on the chunks of a version
-- ARGV[6]  site_prefix     of site keys: their registrations and counts stay
-- ARGV[7]  updates_prefix  of streams of updates
-- ARGV[8...]               versions to keep besides the head
-- Returns 1, or -1 if another coordinator leads.
local leader_key, config_key, head_key, versions_key, clients_key = unpack(KEYS, 1, 5)
local first_working_key = 6
local token, because, failed, model_prefix, model_chunks, site_prefix, updates_prefix = unpack(ARGV, 1, 7)
local first_version = 8

if redis.call('HGET', leader_key, 'token') ~= token then return -1 end
redis.call('HSET', config_key, 'state', 'ended', 'stopped_because', because, 'failed', failed)
local kept = {[redis.call('HGET', head_key, 'version')] = true}
for i = first_version, #ARGV do kept[ARGV[i]] = true end
for _, version in ipairs(redis.call('ZRANGE', versions_key, 0, -1)) do
  if not kept[version] then
    redis.call('ZREM', versions_key, version)
    for chunk = 0, tonumber(model_chunks) - 1 do redis.call('UNLINK', model_prefix .. version .. ':' .. chunk) end
  end
end
for _, client in ipairs(redis.call('SMEMBERS', clients_key)) do
  redis.call('HDEL', site_prefix .. client, 'holder', 'alive', 'job')
  redis.call('UNLINK', updates_prefix .. client)
end
redis.call('UNLINK', updates_prefix)  -- the coordinator's own stream
for i = first_working_key, #KEYS do redis.call('UNLINK', KEYS[i]) end
return 1
