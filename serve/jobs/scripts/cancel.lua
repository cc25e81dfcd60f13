-- ARGV: ttl, id. A queued job ends at once. The worker of a running one is rung, and told when it renews its lease.
local id = ARGV[2]
local state = get(id, 'state')
if state == 'queued' then
  finish(id, 'cancelled')
elseif state == 'running' then
  set(id, 'cancel', 1)
  redis.call('PUBLISH', cancel_channel(id), '')
end
return {ended, snapshot(id)}
