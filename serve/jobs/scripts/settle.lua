-- ARGV: ttl, id, fence, outcome, most attempts, then the record's fields and values of the outcome.
-- Outcomes: succeeded, failed, cancelled; retry (the attempt failed) and release (the attempt does not count).
-- Answers 'lost', 'again' or the tiers of the units that were encoded ahead ('' for none). The same settlement again does
-- nothing: the first answer may have been lost.
local id, fence, outcome, max_attempts = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local settlement = fence .. ':' .. outcome
if get(id, 'settled') == settlement then return {ended, 'again'} end
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
return {ended, get(id, 'ahead') or ''}
