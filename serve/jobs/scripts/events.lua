-- ARGV: ttl, id, start of the range, count. Answers {state, entries}; the state is false when there is no such job.
local id = ARGV[2]
return {ended, {get(id, 'state'), redis.call('XRANGE', events_key(id), ARGV[3], '+', 'COUNT', ARGV[4])}}
