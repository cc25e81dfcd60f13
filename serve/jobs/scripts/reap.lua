-- ARGV: ttl, most attempts, most jobs of one call, error of a job without a worker, error of a job without time.
-- Answers the number of jobs that were changed.
local max_attempts, limit = tonumber(ARGV[2]), ARGV[3]
local late = redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', now, 'LIMIT', 0, limit)
for _, id in ipairs(late) do
  if exists(id) then finish(id, 'expired', 'error', ARGV[5]) else forget(id) end
end
local lapsed = redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, limit)
for _, id in ipairs(lapsed) do
  if exists(id) then retry(id, max_attempts, ARGV[4]) else forget(id) end
end
return {ended, #late + #lapsed}
