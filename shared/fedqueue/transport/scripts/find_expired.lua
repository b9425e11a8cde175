-- What has run out by the server's clock. Changes nothing.
-- KEYS[1]  jobs, KEYS[2] clients
-- ARGV[1]  prefix of attempt keys, ARGV[2] of site keys (same slot)
-- Returns {jobs whose lease is over, clients that are no longer alive}.
-- A time that is no number is over: those records are the workers' word.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function over(text) return not ((tonumber(text) or 0) > now) end
local jobs, clients = {}, {}
for _, job in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local attempt = redis.call('HMGET', ARGV[1] .. job, 'posted', 'lease')
  if not attempt[1] and over(attempt[2] or '') then jobs[#jobs + 1] = job end
end
for _, client in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  local alive = redis.call('HGET', ARGV[2] .. client, 'alive')
  if alive and over(alive) then clients[#clients + 1] = client end
end
return {jobs, clients}
