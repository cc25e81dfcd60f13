-- ARGV: settings, for how long it counts, worker, report. With no worker: the reports that count.
for _, name in ipairs(redis.call('ZRANGEBYSCORE', ALIVE, '-inf', now)) do
  redis.call('ZREM', ALIVE, name)
  redis.call('HDEL', WORKERS, name)
end
if ARGV[5] then
  redis.call('ZADD', ALIVE, now + tonumber(ARGV[4]), ARGV[5])
  redis.call('HSET', WORKERS, ARGV[5], ARGV[6])
  return {ended, 1}
end
return {ended, redis.call('HVALS', WORKERS)}
