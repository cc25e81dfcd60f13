-- ARGV: settings, most jobs of one call, error of a job without a worker, of one without time, of one that was never
-- started. Answers the number of jobs that were changed.
local limit = ARGV[4]
local late = redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', now, 'LIMIT', 0, limit)
for _, id in ipairs(late) do
  if exists(id) then
    finish(id, 'expired', false, 'error', get(id, 'fence') == '0' and ARGV[7] or ARGV[6])
  else
    forget_lost(id)
  end
end
local lapsed = redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, limit)
for _, id in ipairs(lapsed) do
  if exists(id) then
    redis.call('HINCRBY', job_key(id), 'lost', 1)
    retry(id, 0, ARGV[5])
  else
    forget_lost(id)
  end
end
return {ended, #late + #lapsed}
