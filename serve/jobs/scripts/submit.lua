-- ARGV: ttl, id, most that may wait, time until it expires, then the record's fields and values.
-- Answers {'queued', snapshot}, or {'full', milliseconds until a place is free}. The same id again is the same job:
-- the answer to the first call may have been lost.
local id, max_queued, timeout = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if exists(id) then
  return {ended, {'queued', snapshot(id)}}
end
local depth = redis.call('ZCARD', QUEUE)
if depth >= max_queued then
  -- Little's law: the head of a queue of `depth` waited as long as `depth` departures took.
  local waited = now - (get(redis.call('ZRANGE', QUEUE, 0, 0)[1], 'created') or now)
  return {ended, {'full', math.floor(waited / depth)}}
end
set(id, 'state', 'queued', 'sequence', redis.call('INCR', 'tandem:sequence'), 'created', now,
    'attempt', 0, 'fence', 0, 'step', 0, unpack(ARGV, 5))
redis.call('ZADD', DEADLINES, now + timeout, id)
enqueue(id)
return {ended, {'queued', snapshot(id)}}
