-- ARGV: settings, id, fence, then index of the image, step and JPEG file of each preview. Answers 'held' or 'lost'; a
-- lost claim writes nothing. An image's former preview leaves the stream. The record's own step stays what it is.
local id, fence = ARGV[4], ARGV[5]
if not holds(id, fence) then return {ended, 'lost'} end
local state, steps, attempt = get(id, 'state', 'steps', 'attempt')
for i = 6, #ARGV, 3 do
  local index, step, data = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]
  local former = redis.call('HGET', previews_key(id), index .. ':entry')
  if former then redis.call('XDEL', events_key(id), former) end
  local entry = redis.call('XADD', events_key(id), '*', 'state', state, 'step', math.min(step, tonumber(steps)),
      'steps', steps, 'index', index, 'attempt', attempt, 'fence', fence)
  redis.call('HSET', previews_key(id), index .. ':entry', entry, index, data)
end
redis.call('PUBLISH', events_key(id), '')
return {ended, 'held'}
