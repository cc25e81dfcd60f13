-- ARGV: settings, owner, allowance: requests a minute, milliseconds a day, most unfinished (-1 for no bound). Its limits
-- as submit.lua tells them. Nothing is charged.
return {ended, limits_of(ARGV[4], allowance(ARGV[4], ARGV[5], ARGV[6]), tonumber(ARGV[7]))}
