-- ARGV: settings, id. The snapshot of a job that has ended, as a client is told of it; of another its first half is empty,
-- and the second is 1 where there is such a job.
local id = ARGV[4]
local state, finished = get(id, 'state', 'finished')
if not finished then return {ended, {{}, state and 1 or 0}} end
tell_end(id, finished)
return {ended, snapshot(id)}
