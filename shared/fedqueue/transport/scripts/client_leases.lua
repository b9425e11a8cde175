-- Tell how long the leases of some clients last by the server's clock. Changes nothing.
-- KEYS[1]  clients      set of clients; it is not read, and decides the slot
-- ARGV[1]  site_prefix  of site keys (same slot)
-- ARGV[2]  most_ms      upper bound on the answers
-- ARGV[3...]            clients
-- Returns for each client the milliseconds that its lease still lasts, 0 if it has ended, -1 if it has none. A lease that
-- is not a number has ended: workers write these records.
local site_prefix, most_ms = ARGV[1], tonumber(ARGV[2])
local first_client = 3

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local reply = {}
for i = first_client, #ARGV do
  local alive_until = redis.call('HGET', site_prefix .. ARGV[i], 'alive')
  local left = (tonumber(alive_until or '') or 0) - now
  if not (left > 0) then left = 0 end
  reply[#reply + 1] = alive_until and math.ceil(math.min(left, most_ms)) or -1
end
return reply
