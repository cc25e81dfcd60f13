-- ARGV: settings, id, owner, fingerprint of the order ('' for one that is not idempotent), for how long that is kept;
-- most that may wait, and most milliseconds of the model's that may wait; time until it expires; allowance: requests a
-- minute, milliseconds a day, most unfinished (-1 for no bound); then the record's fields and values.
-- Answers {'queued', snapshot, limits}, {'again', snapshot, limits} for an order that is there already; 'taken',
-- 'conflict', 'gone'; {'full', milliseconds of work that wait, milliseconds too many}; {'limited', name, milliseconds
-- until it fits, limits}. Limits are {name, size, left, milliseconds until all is back}. The same call again is no other
-- order: the answer to the first may have been lost.
local id, owner, fingerprint, order_ttl = ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local max_queued, max_ms, queue_ttl = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local FIELDS = 14
local record = {}
for i = FIELDS, #ARGV, 2 do record[ARGV[i]] = ARGV[i + 1] end
local cost = tonumber(record.cost)

local buckets = allowance(owner, ARGV[11], ARGV[12])
local most_unfinished = tonumber(ARGV[13])
buckets[1].price, buckets[2].price = 1, cost

local function limits() return limits_of(owner, buckets, most_unfinished) end

local before = former(id, owner, fingerprint)
if before == 'again' then
  return {ended, {get(id, 'token') == record.token and 'queued' or 'again', snapshot(id), limits()}}
elseif before then
  return {ended, {before}}
end

-- The caller's own bounds come first: who is over them is not told to come back when others have finished.
for _, bucket in ipairs(buckets) do
  -- What costs more than the whole bucket is let in by a full one, and paid off later.
  local missing = bucket.size >= 0 and math.min(bucket.price, bucket.size) - bucket.left or 0
  if bucket.size == 0 or missing > 0 then
    local wait = bucket.size == 0 and bucket.window or missing * bucket.window / bucket.size
    return {ended, {'limited', bucket.name, math.ceil(wait), limits()}}
  end
end
if most_unfinished >= 0 and tonumber(redis.call('HGET', UNFINISHED, owner) or 0) >= most_unfinished then
  return {ended, {'limited', 'max_unfinished', 0, limits()}}
end

local waiting_ms = tonumber(redis.call('HGET', BACKLOG, record.model) or 0)
local over_ms = waiting_ms + cost - max_ms
-- An empty queue takes any job: there is nothing that it could wait for.
if redis.call('ZCARD', QUEUE) >= max_queued or (waiting_ms > 0 and over_ms > 0) then
  return {ended, {'full', waiting_ms, math.max(0, over_ms)}}
end

local keep = 0
for _, bucket in ipairs(buckets) do
  if bucket.size >= 0 then
    bucket.left = bucket.left - bucket.price
    redis.call('HSET', allowance_key(owner), bucket.name, number(bucket.left), bucket.name .. ':at', now)
    local debt = bucket.size > 0 and math.max(0, -bucket.left) * bucket.window / bucket.size or 0
    keep = math.max(keep, math.ceil(debt) + 2 * DAY)
  end
end
if keep > 0 then redis.call('PEXPIRE', allowance_key(owner), keep) end
local sequence = redis.call('INCR', SEQUENCE)
set(id, 'state', 'queued', 'sequence', sequence, 'created', now, 'attempt', 0, 'fence', 0, 'lost', 0, 'step', 0,
    'owner', owner, 'fingerprint', fingerprint, unpack(ARGV, FIELDS))
if fingerprint ~= '' then redis.call('SET', order_key(id), owner .. ':' .. fingerprint, 'PX', order_ttl) end
redis.call('ZADD', RECORDS, sequence, id)
redis.call('ZADD', owner_key(owner), sequence, id)
redis.call('ZADD', DEADLINES, now + queue_ttl, id)
count(UNFINISHED, owner, 1)
enqueue(id)
return {ended, {'queued', snapshot(id), limits()}}
