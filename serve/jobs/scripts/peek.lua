-- ARGV: settings, name of an order, id that it would have, owner, fingerprint. What a submission of it would come to
-- without being logged: {'again', id, snapshot}, {'taken'}, {'conflict'}, {'gone'} or {'new'}.
local before, job = former(ARGV[4], ARGV[5], ARGV[6], ARGV[7])
if before == 'again' then return {ended, {before, job, snapshot(job)}} end
return {ended, {before or 'new'}}
