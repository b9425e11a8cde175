-- Read what is known about a job whose lease has ended. Changes nothing.
-- KEYS[1]  attempt  hash {number, holder, phase, stalled, ...}: the worker's record
-- KEYS[2]  site     hash of the client {holder, alive, ...}
-- Returns {1 if an attempt has begun, 1 if the worker that held the job is alive, 1 if its last heartbeat reported no
-- progress, the phase of the attempt}. The phase is '' if a worker wrote anything but a short word.
local attempt_key, site_key = KEYS[1], KEYS[2]

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local attempt = redis.call('HMGET', attempt_key, 'number', 'holder', 'stalled')
local number, holder, stalled = attempt[1], attempt[2], attempt[3]
local site = redis.call('HMGET', site_key, 'holder', 'alive')
local served_by, alive_until = site[1], tonumber(site[2] or '')
local phase = ''
if redis.call('HSTRLEN', attempt_key, 'phase') < 16 then phase = redis.call('HGET', attempt_key, 'phase') or '' end
local begun = (tonumber(number or '') or 0) > 0
local alive = served_by and served_by == holder and alive_until and alive_until > now
return {begun and 1 or 0, alive and 1 or 0, stalled == '1' and 1 or 0, phase}
