-- ARGV: ttl, id, tiers by unit. An ended job's record stays as it is.
local id = ARGV[2]
if redis.call('ZSCORE', DEADLINES, id) then set(id, 'ahead', ARGV[3]) end
return {ended, false}
