-- Read the registrations of some clients. Changes nothing.
-- KEYS[1], KEYS[2] and so on   for each client, its hash {registration, ...}
-- ARGV[1]  most_bytes  length above which a registration is left out: workers write these records
-- Returns for each client its registration, or false.
local most_bytes = tonumber(ARGV[1])

local reply = {}
for i, site_key in ipairs(KEYS) do
  local length = redis.call('HSTRLEN', site_key, 'registration')
  reply[i] = length > 0 and length <= most_bytes and redis.call('HGET', site_key, 'registration')
end
return reply
