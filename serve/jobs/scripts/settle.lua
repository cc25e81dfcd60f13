-- ARGV: ttl, id, fence, outcome, most attempts, then the record's fields and values of the outcome.
-- Outcomes: succeeded, failed, cancelled; retry (the attempt failed) and release (the attempt does not count).
-- Answers 'ok' or 'lost'. The same settlement again is 'ok' and does nothing: the first answer may have been lost.
local id, fence, outcome, max_attempts = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local settlement = fence .. ':' .. outcome
if get(id, 'settled') == settlement then return {ended, 'ok'} end
if not holds(id, fence) then return {ended, 'lost'} end
set(id, 'settled', settlement)
if outcome == 'release' then
  redis.call('HINCRBY', job_key(id), 'attempt', -1)
  retry(id, max_attempts, '')
elseif outcome == 'retry' then
  retry(id, max_attempts, ARGV[7])
else
  finish(id, outcome, unpack(ARGV, 6))
end
return {ended, 'ok'}
