-- ARGV: settings, worker, number of its claim, lease, time from the first claim until it expires, 1 where the worker
-- holds nothing, the latest schema of an order that it reads, how long marks count (pixels up to which they always do,
-- pixels up to which they do for so many milliseconds of waiting, these, and those beyond; -1 for ever), the images that
-- fit beside those it holds, then model, above, upto, least milliseconds of waiting and what a mark must be below of each
-- want, in order.
-- Leases the queued job that satisfies the first want which any of them satisfies; of those, the one whose round comes
-- first, and of one round the oldest. Of an owner's jobs that satisfy a want the first in the queue stands for all. A job
-- satisfies a want when it is for the want's model, has more than `above` and at most `upto` pixels, has waited so long
-- since it last joined the queue, may be started by now, and still has time; the sweep ends those that have none. An id
-- whose record somebody deleted satisfies nothing: the sweep forgets it. A job that ran out of memory is marked with what
-- there was of it (`above_mb`): it satisfies only wants with more, until its mark counts no more. One of a later `schema`
-- than the worker reads satisfies nothing: it waits for a worker of the release that wrote it.
-- The last attempt of a job that has lost a worker is made alone: should it be the job that kills them, it takes nobody
-- along. A worker that holds others is told to wait: 'alone'.
-- 'unfit' says that jobs are queued, but none that satisfies a want; nothing, that the queue is empty. What is claimed
-- comes with the number of jobs that are still queued.
-- The same claim again has the same answer while the job is held: the first one may have been lost.
-- A worker that is left with nothing to claim stands by from the same moment: what is queued after it is told to it.
local worker, claim, lease, timeout, idle = ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8] == '1'
local reads, alive, coming = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local coming_for, rest_for, free = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])

local function answer(id)
  local attempt, fence, alone = get(id, 'attempt', 'fence', 'alone_now')
  return {id, tonumber(attempt), tonumber(fence), tonumber(alone or 0),
      redis.call('ZCARD', QUEUE), get(id, 'created', 'waiting', 'started', 'trace', 'cost', 'request', 'truncated', 'memory')}
end

local wants = {}
for i = 15, #ARGV, 5 do
  wants[#wants + 1] = {
    model = ARGV[i], above = tonumber(ARGV[i + 1]), upto = tonumber(ARGV[i + 2]), waited = tonumber(ARGV[i + 3]),
    outdone = tonumber(ARGV[i + 4])
  }
end

-- By the largest image that it wants of each model. A Redis that takes no more writes still says that there is nothing.
local largest, takes = {}, FULL
for _, want in ipairs(wants) do
  largest[want.model] = math.max(largest[want.model] or 0, want.upto)
  if want.waited == 0 then takes = idle and 0 or HOLDING end
end
local function stand_by(kind)
  local lot = (tonumber(string.sub(claim, 1, 2), 16) or 0) / 256
  for model, upto in pairs(largest) do
    local key = standby_key(model)
    local rank = tonumber(redis.call('ZSCORE', key, worker) or -1)
    -- Most looks find what the last one has left, and write nothing.
    if math.floor(rank) ~= kind + upto then redis.pcall('ZADD', key, number(kind + upto + lot), worker) end
    if redis.call('PTTL', key) < STANDBY_MS / 2 then redis.pcall('PEXPIRE', key, STANDBY_MS) end
  end
end

-- With a job that it was just given, too.
local function stand_by_beside(id)
  local rows = get(id, 'rows')
  stand_by(free > tonumber(rows or 1) and HOLDING or FULL)
end

local function stand_by_no_more()
  for model in pairs(largest) do redis.call('ZREM', standby_key(model), worker) end
end

local former_id = redis.call('GET', claim_key(worker, claim))
if former_id and get(former_id, 'claim') == worker .. ':' .. claim and HELD[get(former_id, 'state')] then
  redis.call('ZADD', LEASES, now + lease, former_id)
  if redis.call('ZCARD', QUEUE) == 0 then stand_by_beside(former_id) end
  return {ended, answer(former_id)}
end

-- Whether the mark of a job of so many pixels that has waited so long still counts.
local function counts(pixels, waited)
  local patience = pixels <= alive and -1 or pixels <= coming and coming_for or rest_for
  return patience < 0 or waited < patience
end

local function satisfies(want, model, pixels, waited, mark)
  return model == want.model and pixels > want.above and pixels <= want.upto and waited >= want.waited
      and (not mark or mark < want.outdone)
end

local paid, seen, PAGE = {}, {}, 100
local found, rank, round = nil, #wants + 1, nil

-- The last attempt of a job that has lost a worker.
local function last(id)
  local lost, attempt = get(id, 'lost', 'attempt')
  return tonumber(lost or 0) > 0 and tonumber(attempt) == MAX_ATTEMPTS - 1
end

-- One worker at a time clears its rows for such a job; the others draw what else there is.
local function reserved(id)
  local by, till = get(id, 'reserved', 'reserved_till')
  return not idle and by and by ~= worker and tonumber(till) > now and last(id)
end

-- What was found only gives way to a job of an earlier want, or of the same want and an earlier round.
local function consider(id)
  local model, pixels, since, owner, not_before, mark, schema =
      get(id, 'model', 'pixels', 'waiting', 'owner', 'not_before', 'above_mb', 'schema')
  local deadline = tonumber(redis.call('ZSCORE', DEADLINES, id) or 0)
  if not model or not owner or deadline <= now or tonumber(not_before or 0) > now then return end
  if tonumber(schema or 1) > reads or reserved(id) then return end
  local waited = now - (since or now)
  pixels = tonumber(pixels or 0)
  mark = mark and counts(pixels, waited) and tonumber(mark)
  for n = 1, math.min(rank, #wants) do
    if satisfies(wants[n], model, pixels, waited, mark) then
      if seen[n .. owner] then return end
      seen[n .. owner] = true
      paid[owner] = paid[owner] or tonumber(redis.call('ZSCORE', ROUNDS, owner) or 0)
      local its = round_of(id, paid[owner])
      if n < rank or its < round then found, rank, round = id, n, its end
      return
    end
  end
end

local owners, page, ids = redis.call('ZCARD', ROUNDS), 0, nil
repeat
  ids = redis.call('ZRANGE', QUEUE, page * PAGE, (page + 1) * PAGE - 1)
  for _, id in ipairs(ids) do
    consider(id)
    if rank == 1 and owners == 1 then break end
  end
  page = page + 1
until #ids < PAGE or (rank == 1 and owners == 1)
if not found then
  stand_by(takes)
  return {ended, redis.call('ZCARD', QUEUE) > 0 and 'unfit'}
end

local id = found
local owner, fence = get(id, 'owner', 'fence')
local alone = last(id)
if alone and not idle then
  set(id, 'reserved', worker, 'reserved_till', now + lease)
  stand_by_no_more()
  return {ended, 'alone'}
end
dequeue(id)
if redis.call('HEXISTS', WAITING, owner) == 1 then redis.call('ZADD', ROUNDS, number(round), owner) end
if redis.call('ZCARD', QUEUE) > 0 then
  redis.call('SET', ROUND, number(math.max(round, tonumber(redis.call('GET', ROUND) or 0))))
  stand_by_no_more()
else
  stand_by_beside(id)
end
redis.call('ZADD', LEASES, now + lease, id)
if fence == '0' then redis.call('ZADD', DEADLINES, now + timeout, id) end
redis.call('HINCRBY', job_key(id), 'attempt', 1)
redis.call('HINCRBY', job_key(id), 'fence', 1)
set(id, 'state', 'encoding', 'step', 0, 'started', now, 'worker', worker, 'claim', worker .. ':' .. claim,
    'alone_now', alone and 1 or 0)
redis.call('SET', claim_key(worker, claim), id, 'PX', lease)
redis.call('HDEL', job_key(id), 'not_before')
emit(id)
return {ended, answer(id)}
