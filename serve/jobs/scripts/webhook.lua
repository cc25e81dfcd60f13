-- ARGV: settings, what: 'due' with lease and most jobs answers the ids whose call is due, which nobody else is given
-- before the lease is over; 'call' with id and lease counts a call that is now made, and renews that; 'done' with id and
-- state ends the telling; 'again' with id and milliseconds puts it off. The last three answer how many calls there were.
local what = ARGV[4]
if what == 'due' then
  local ids = redis.call('ZRANGEBYSCORE', WEBHOOKS, '-inf', now, 'LIMIT', 0, ARGV[6])
  for _, id in ipairs(ids) do
    redis.call('ZADD', WEBHOOKS, now + tonumber(ARGV[5]), id)
  end
  return {ended, ids}
end
local id = ARGV[5]
if not redis.call('ZSCORE', WEBHOOKS, id) or not exists(id) then
  redis.call('ZREM', WEBHOOKS, id)
  return {ended, 0}
end
if what == 'done' then
  redis.call('ZREM', WEBHOOKS, id)
  set(id, 'webhook_state', ARGV[6])
else
  if what == 'call' then redis.call('HINCRBY', job_key(id), 'webhook_calls', 1) end
  redis.call('ZADD', WEBHOOKS, now + tonumber(ARGV[6]), id)
end
return {ended, tonumber(get(id, 'webhook_calls') or 0)}
