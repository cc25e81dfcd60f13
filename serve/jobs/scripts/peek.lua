-- ARGV: settings, id, owner, fingerprint. What a submission of that order under that id would come to without being
-- logged: {'again', snapshot}, {'taken'}, {'conflict'}, {'gone'} or {'new'}.
local id = ARGV[4]
local before = former(id, ARGV[5], ARGV[6])
return {ended, {before or 'new', before == 'again' and snapshot(id)}}
