-- ARGV: settings, id, owner, fingerprint of the order ('' for one that is not idempotent), its name, for how long that is
-- kept; most that may wait, and most milliseconds of the model's that may wait; time until it expires; allowance:
-- requests a minute, milliseconds a day, most unfinished (-1 for no bound); then the record's fields and values.
-- Answers {'queued', id, snapshot, limits}, {'again', id, snapshot, limits} for an order that is there already; 'taken',
-- 'conflict', 'gone'; {'full', milliseconds of work that wait, milliseconds too many}; {'limited', name, milliseconds
-- until it fits, limits}. Limits are {name, size, left, milliseconds until all is back}. The same call again is no other
-- order: the answer to the first may have been lost.
local id, owner, fingerprint, name, order_ttl = ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local max_queued, max_ms, queue_ttl = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local FIELDS = 15
local record = {}
for i = FIELDS, #ARGV, 2 do record[ARGV[i]] = ARGV[i + 1] end
local cost = tonumber(record.cost)
local buckets, most_unfinished = allowance(owner, ARGV[12], ARGV[13]), tonumber(ARGV[14])

local before, job = former(name, id, owner, fingerprint)
if before == 'again' then
  local mine = get(job, 'token') == record.token
  return {ended, {mine and 'queued' or 'again', job, snapshot(job), limits_of(owner, buckets, most_unfinished)}}
elseif before then
  return {ended, {before}}
end
local refused = refusal(owner, buckets, most_unfinished, record.model, cost, max_queued, max_ms)
if refused then return {ended, refused} end

local prices, keep = {requests_per_minute = 1, engine_s_per_day = cost}, 0
for _, bucket in ipairs(buckets) do
  if bucket.size >= 0 then
    bucket.left = bucket.left - prices[bucket.name]
    redis.call('HSET', allowance_key(owner), bucket.name, number(bucket.left), bucket.name .. ':at', now)
    local debt = bucket.size > 0 and math.max(0, -bucket.left) * bucket.window / bucket.size or 0
    keep = math.max(keep, math.ceil(debt) + 2 * DAY)
  end
end
if keep > 0 then redis.call('PEXPIRE', allowance_key(owner), keep) end
local sequence = redis.call('INCR', SEQUENCE)
set(id, 'state', 'queued', 'sequence', sequence, 'created', now, 'attempt', 0, 'fence', 0, 'lost', 0, 'step', 0,
    'owner', owner, 'fingerprint', fingerprint, unpack(ARGV, FIELDS))
if fingerprint ~= '' then
  redis.call('HSET', order_key(name), 'owner', owner, 'fingerprint', fingerprint, 'job', id)
  redis.call('PEXPIRE', order_key(name), order_ttl)
end
redis.call('ZADD', RECORDS, sequence, id)
redis.call('ZADD', owner_key(owner), sequence, id)
redis.call('ZADD', DEADLINES, now + queue_ttl, id)
count(UNFINISHED, owner, 1)
enqueue(id)
return {ended, {'queued', id, snapshot(id), limits_of(owner, buckets, most_unfinished)}}
