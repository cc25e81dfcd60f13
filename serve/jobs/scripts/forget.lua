-- ARGV: settings, milliseconds, then ids. With 0, deletes the records of those that are overdue; else their time goes on
-- for so long. Answers how many there were.
local delay, done = tonumber(ARGV[4]), 0
for i = 5, #ARGV do
  local id = ARGV[i]
  local over = redis.call('ZSCORE', ENDED, id)
  if over and tonumber(over) <= now then
    done = done + 1
    if delay > 0 then
      redis.call('ZADD', ENDED, now + delay, id)
    else
      local owner = get(id, 'owner')
      if owner then redis.call('ZREM', owner_key(owner), id) end
      redis.call('DEL', job_key(id), events_key(id), previews_key(id))
      for _, index in ipairs({RECORDS, ENDED, DEAD, WEBHOOKS}) do redis.call('ZREM', index, id) end
    end
  end
end
return {ended, done}
