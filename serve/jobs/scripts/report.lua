-- ARGV: settings, for how long it counts, worker, report. With no worker: {the reports that count, the last report of each
-- placement that had workers and whose last one has fallen silent}.
local SILENT_TTL_MS = 30 * 86400000
for _, name in ipairs(redis.call('ZRANGEBYSCORE', ALIVE, '-inf', now)) do
  local report = redis.call('HGET', WORKERS, name)
  local read, told = pcall(cjson.decode, report or '')
  if read and type(told) == 'table' and type(told.placement) == 'string' then
    redis.call('HSET', SILENT, told.placement, report)
    redis.call('PEXPIRE', SILENT, SILENT_TTL_MS)
  end
  redis.call('ZREM', ALIVE, name)
  redis.call('HDEL', WORKERS, name)
end
if ARGV[5] then
  redis.call('ZADD', ALIVE, now + tonumber(ARGV[4]), ARGV[5])
  redis.call('HSET', WORKERS, ARGV[5], ARGV[6])
  return {ended, 1}
end
return {ended, {redis.call('HVALS', WORKERS), redis.call('HVALS', SILENT)}}
