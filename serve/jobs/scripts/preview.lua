-- ARGV: ttl, id, fence, index of the image, step, JPEG file. Answers 'held' or 'lost'; a lost claim writes nothing.
-- The image's former preview leaves the stream. The record's own step stays what it is.
local id, fence, index, step, data = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
if not holds(id, fence) then return {ended, 'lost'} end
local former = redis.call('HGET', previews_key(id), index .. ':entry')
if former then redis.call('XDEL', events_key(id), former) end
local steps = get(id, 'steps')
local entry = redis.call('XADD', events_key(id), '*', 'state', 'running', 'step', math.min(step, tonumber(steps)),
    'steps', steps, 'index', index)
redis.call('HSET', previews_key(id), index .. ':entry', entry, index, data)
redis.call('PUBLISH', events_key(id), '')
return {ended, 'held'}
