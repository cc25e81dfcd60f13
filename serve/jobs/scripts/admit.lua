-- ARGV: settings, owner, model, cost, most that may wait, most milliseconds of the model's that may wait, allowance as in
-- submit.lua. Whether an order would be taken now: 'admitted', or the refusal as submit.lua tells it. Nothing is charged.
local owner, buckets = ARGV[4], allowance(ARGV[4], ARGV[9], ARGV[10])
local refused = refusal(owner, buckets, tonumber(ARGV[11]), ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]))
return {ended, refused or {'admitted'}}
