-- ARGV: settings, model. {jobs that wait for it, milliseconds that wait for it, milliseconds that are held}.
local left = 0
for n, part in ipairs(held(ARGV[4])) do
  if n % 2 == 1 then left = left + part end
end
local jobs, ms = unpack(redis.call('HMGET', LINES .. ARGV[4], 'jobs', 'ms'))
return {ended, {tonumber(jobs or 0), tonumber(ms or 0), left}}
