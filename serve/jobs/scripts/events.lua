-- ARGV: settings, id, start of the range, count, 1 for the previews' files, 1 where a client is told of them. Answers
-- {state, entries, files}; the state is false when there is no such job. Of the files, entry n's is the nth: the preview
-- that it tells of, else false.
local id = ARGV[4]
local entries, files = redis.call('XRANGE', events_key(id), ARGV[5], '+', 'COUNT', ARGV[6]), {}
for n, entry in ipairs(entries) do
  local name, index = unpack(entry[2], 7)
  files[n] = ARGV[7] == '1' and name == 'index' and redis.call('HGET', previews_key(id), index)
end
local state, finished = get(id, 'state', 'finished')
if finished and ARGV[8] == '1' and #entries < tonumber(ARGV[6]) then tell_end(id, finished) end
return {ended, {state, entries, files}}
