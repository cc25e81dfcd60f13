-- ARGV: settings, id, tiers by unit, milliseconds that it took. An ended job's record stays as it is.
local id = ARGV[4]
if redis.call('ZSCORE', DEADLINES, id) then set(id, 'ahead', ARGV[5], 'ahead_took', ARGV[6]) end
return {ended, false}
