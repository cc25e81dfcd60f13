-- ARGV: settings, index, sequence to begin below ('+inf' for the newest), most jobs, most records to look at, then the
-- states that are wanted (none: all). Answers {ids, records, where to go on ('' at the end)}, newest first.
local index, below, most, looked = ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local wanted, all = {}, #ARGV < 8
for i = 8, #ARGV do wanted[ARGV[i]] = true end
local ids, records, rest = {}, {}, ''
local page = redis.call('ZREVRANGEBYSCORE', index, '(' .. below, '-inf', 'WITHSCORES', 'LIMIT', 0, looked)
for i = 1, #page, 2 do
  local id = page[i]
  if exists(id) and (all or wanted[get(id, 'state')]) then
    ids[#ids + 1], records[#records + 1] = id, redis.call('HGETALL', job_key(id))
  end
  rest = page[i + 1]
  if #ids == most then break end
end
if redis.call('ZCOUNT', index, '-inf', '(' .. (rest == '' and '-inf' or rest)) == 0 then rest = '' end
return {ended, {ids, records, rest}}
