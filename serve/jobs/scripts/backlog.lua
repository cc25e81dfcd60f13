-- ARGV: settings, model. {jobs that wait for any model, milliseconds that wait for this one, milliseconds that are held}.
local left = 0
for n, part in ipairs(held(ARGV[4])) do
  if n % 2 == 1 then left = left + part end
end
return {ended, {redis.call('ZCARD', QUEUE), tonumber(redis.call('HGET', BACKLOG, ARGV[4]) or 0), left}}
