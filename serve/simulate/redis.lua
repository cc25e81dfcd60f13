-- The part of Redis that the job scripts call, as tables of one Lua state: `redis.call` and `redis.pcall` for the scripts,
-- on a clock that the simulation sets. Answers are as Redis gives them to Lua: text, whole numbers, false for nothing.
-- Streams, channels and times to live are taken and forgotten: nobody in a simulation reads them, and what they end
-- (records, orders) is forgotten by the scripts themselves. A command that is not here is an error.
local format, floor, insert, remove = string.format, math.floor, table.insert, table.remove
local values, hashes, sets = {}, {}, {}
local clock_ms = 0

local function text(value)
  if type(value) == 'string' then return value end
  return format('%.17g', value)
end

-- A sorted set: `scores` by member, `members` in order of (score, member).
local function set_of(key, make)
  local found = sets[key]
  if not found and make then
    found = {scores = {}, members = {}}
    sets[key] = found
  end
  return found
end

-- The first place whose member comes at or after (score, member).
local function place_of(set, score, member)
  local members, scores = set.members, set.scores
  local low, high = 1, #members + 1
  while low < high do
    local middle = floor((low + high) / 2)
    local other = members[middle]
    local its = scores[other]
    if its < score or (its == score and other < member) then low = middle + 1 else high = middle end
  end
  return low
end

local function drop(key, set, member)
  local score = set.scores[member]
  if not score then return 0 end
  remove(set.members, place_of(set, score, member))
  set.scores[member] = nil
  if #set.members == 0 then sets[key] = nil end
  return 1
end

local function bound(value, otherwise)
  if value == '-inf' or value == '+inf' then return otherwise end
  return tonumber(value)
end

local commands = {}

function commands.TIME()
  local ms = floor(clock_ms)
  return {format('%d', floor(ms / 1000)), format('%d', (ms % 1000) * 1000)}
end

function commands.GET(key) return values[key] or false end
function commands.SET(key, value) values[key] = text(value) end
function commands.INCR(key)
  values[key] = text(tonumber(values[key] or 0) + 1)
  return tonumber(values[key])
end
function commands.EXISTS(key) return (values[key] or hashes[key] or sets[key]) and 1 or 0 end
function commands.DEL(...)
  for n = 1, select('#', ...) do
    local key = select(n, ...)
    values[key], hashes[key], sets[key] = nil, nil, nil
  end
end

function commands.HSET(key, ...)
  local hash = hashes[key]
  if not hash then
    hash = {}
    hashes[key] = hash
  end
  for n = 1, select('#', ...), 2 do
    local field, value = select(n, ...)
    hash[field] = text(value)
  end
end
function commands.HGET(key, field) return hashes[key] and hashes[key][field] or false end
function commands.HMGET(key, ...)
  local hash, found = hashes[key], {}
  for n = 1, select('#', ...) do found[n] = hash and hash[select(n, ...)] or false end
  return found
end
function commands.HGETALL(key)
  local found = {}
  for field, value in pairs(hashes[key] or {}) do
    found[#found + 1] = field
    found[#found + 1] = value
  end
  return found
end
function commands.HKEYS(key)
  local found = {}
  for field in pairs(hashes[key] or {}) do found[#found + 1] = field end
  return found
end
function commands.HVALS(key)
  local found = {}
  for _, value in pairs(hashes[key] or {}) do found[#found + 1] = value end
  return found
end
function commands.HDEL(key, ...)
  local hash = hashes[key]
  if not hash then return 0 end
  for n = 1, select('#', ...) do hash[select(n, ...)] = nil end
  if next(hash) == nil then hashes[key] = nil end
end
function commands.HEXISTS(key, field) return hashes[key] and hashes[key][field] and 1 or 0 end
function commands.HINCRBY(key, field, by)
  local hash = hashes[key]
  if not hash then
    hash = {}
    hashes[key] = hash
  end
  local sum = tonumber(hash[field] or 0) + tonumber(by)
  hash[field] = text(sum)
  return sum
end

function commands.ZADD(key, score, member)
  local set = set_of(key, true)
  score, member = tonumber(score), text(member)
  if set.scores[member] == score then return 0 end
  if set.scores[member] then remove(set.members, place_of(set, set.scores[member], member)) end
  insert(set.members, place_of(set, score, member), member)
  set.scores[member] = score
end
function commands.ZREM(key, member)
  local set = set_of(key)
  return set and drop(key, set, member) or 0
end
function commands.ZSCORE(key, member)
  local set = set_of(key)
  local score = set and set.scores[member]
  return score and text(score) or false
end
function commands.ZCARD(key)
  local set = set_of(key)
  return set and #set.members or 0
end
function commands.ZRANGE(key, first, last)
  local set, found = set_of(key), {}
  if not set then return found end
  local members = set.members
  if last < 0 then last = #members + last end
  for n = first + 1, math.min(last + 1, #members) do found[#found + 1] = members[n] end
  return found
end
function commands.ZRANGEBYSCORE(key, low, high, limit, offset, count)
  local set, found = set_of(key), {}
  if not set then return found end
  low, high = bound(low, -math.huge), bound(high, math.huge)
  assert(not limit or (limit == 'LIMIT' and tonumber(offset) == 0))
  count = limit and tonumber(count) or math.huge
  for n = place_of(set, low, ''), #set.members do
    local member = set.members[n]
    if set.scores[member] > high or #found >= count then break end
    found[#found + 1] = member
  end
  return found
end

local function nothing() return 0 end
commands.XADD, commands.XDEL, commands.PUBLISH, commands.PEXPIRE, commands.PTTL = nothing, nothing, nothing, nothing, nothing

redis = {}
function redis.call(name, ...)
  local command = commands[name]
  if not command then error('the simulation has no command ' .. name) end
  return command(...)
end
redis.pcall = redis.call

-- Numbers reach a script as text, as from Redis' wire. Of a list the first five are answered, one by one: no list has to
-- cross to Python.
local function run(script, ms, ...)
  clock_ms, ARGV = ms, {...}
  local answer = script()[2]
  if type(answer) ~= 'table' then return answer end
  return answer[1], answer[2], answer[3], answer[4], answer[5]
end

return run
