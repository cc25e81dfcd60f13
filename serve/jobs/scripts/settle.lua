-- ARGV: settings, id, fence, outcome, milliseconds until another attempt, then the record's fields and values of the
-- outcome: succeeded, failed, cancelled; retry (the attempt failed) and release (the attempt does not count).
-- Answers 'lost', 'again' or the tiers of the units that were encoded ahead ('' for none). The same settlement again does
-- nothing: the first answer may have been lost.
local id, fence, outcome, delay = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
local settlement = fence .. ':' .. outcome
if get(id, 'settled') == settlement then return {ended, 'again'} end
if not holds(id, fence) then return {ended, 'lost'} end
set(id, 'settled', settlement)
if outcome == 'release' then
  redis.call('HINCRBY', job_key(id), 'attempt', -1)
  retry(id, 0, '')
elseif outcome == 'retry' then
  retry(id, delay, ARGV[9])
else
  finish(id, outcome, false, unpack(ARGV, 8))
end
return {ended, get(id, 'ahead') or ''}
