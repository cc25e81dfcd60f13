-- ARGV: settings, id, 1 where it must be this owner's, owner. A queued job ends at once. The worker of a held one is rung,
-- and told when it renews its lease.
local id = ARGV[4]
local state, owner = get(id, 'state', 'owner')
if ARGV[5] == '1' and owner ~= ARGV[6] then return {ended, {{}, false}} end
if state == 'queued' then
  finish(id, 'cancelled', false)
elseif HELD[state] then
  set(id, 'cancel', 1)
  redis.call('PUBLISH', 'tandem:cancel', id)
end
return {ended, snapshot(id)}
