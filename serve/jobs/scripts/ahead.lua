-- ARGV: settings, id, tiers by unit. An ended job's record stays as it is.
local id = ARGV[4]
if redis.call('ZSCORE', DEADLINES, id) then set(id, 'ahead', ARGV[5]) end
return {ended, false}
