-- ARGV: settings, id, fence, outcome, milliseconds until another attempt, the memory that the job ran out of ('' where it
-- may be tried again with as much), how it fared for memory ('' for nothing new), then the record's fields and values of the
-- outcome: succeeded, failed, cancelled; retry (the attempt failed) and release (the attempt does not count).
-- Answers 'lost', 'again' or the tiers of the units that were encoded ahead ('' for none). The same settlement again does
-- nothing: the first answer may have been lost.
local id, fence, outcome, delay = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
local mark, memory = ARGV[8], ARGV[9]
local settlement = fence .. ':' .. outcome
if get(id, 'settled') == settlement then return {ended, 'again'} end
if not holds(id, fence) then return {ended, 'lost'} end
set(id, 'settled', settlement)
if memory ~= '' then set(id, 'memory', memory) end
if mark ~= '' and tonumber(mark) > tonumber(get(id, 'above_mb') or 0) then set(id, 'above_mb', mark) end
if outcome == 'release' then
  redis.call('HINCRBY', job_key(id), 'attempt', -1)
  retry(id, 0, '')
elseif outcome == 'retry' then
  retry(id, delay, ARGV[11])
else
  finish(id, outcome, false, unpack(ARGV, 10))
end
return {ended, get(id, 'ahead') or ''}
