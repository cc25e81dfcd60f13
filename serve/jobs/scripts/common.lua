-- Stands in front of every script. A script is one atomic step: Redis runs nothing else meanwhile.
--
-- Keys. All times are milliseconds of this server's clock; a sequence is the number of a submission.
--   tandem:sequence    counter     number of the latest submission
--   tandem:records     sorted set  job id -> sequence            exactly the jobs that have a record
--   tandem:queue       sorted set  job id -> place               exactly the queued jobs; `batch` after `interactive`
--   tandem:leases      sorted set  job id -> end of the lease    exactly the jobs that a worker holds
--   tandem:deadlines   sorted set  job id -> end of its time     exactly the jobs that have not ended
--   tandem:ended       sorted set  job id -> end of its record   exactly the jobs that have ended
--   tandem:dead        sorted set  job id -> sequence            ended: failed though nothing was wrong with the order
--   tandem:webhooks    sorted set  job id -> time of the call    ended: somebody is still to be told
--   tandem:rounds      sorted set  owner -> rounds paid for      exactly the owners of queued jobs
--   tandem:round       number      the round of the latest claim; gone while nothing is queued
--   tandem:waiting     hash        owner -> number of queued jobs, where there are any
--   tandem:line:MODEL  hash        of its queued jobs: `jobs` and `ms` (predicted) of all, `owners` of them, and
--                                  `jobs:O` and `ms:O` of each owner; gone while there are none
--   tandem:unfinished  hash        owner -> number of jobs that have not ended, where there are any
--   tandem:workers     hash        worker -> its report;  tandem:alive  sorted set  worker -> when that is too old
--   tandem:silent      hash        placement -> the last report of a worker that has fallen silent; has a time to live
--   tandem:standby:MODEL sorted set worker that has nothing to claim -> its rank: HOLDING or FULL where it is that, the
--                                  pixels of the largest image that it takes, and a lot below 1; until it is told of a
--                                  job; has a time to live
--   tandem:owner:O     sorted set  job id -> sequence            the records of one owner
--   tandem:allowance:O hash        the token buckets of an owner; has a time to live
--   tandem:order:NAME  hash        owner, fingerprint and job of an order that is logged once, by its name: the id, or
--                                  what stands for the key that its owner gave; has a time to live, outlives the record
--   tandem:rules       string      the settings of jobs that the server runs with
--   tandem:claim:W:N   string      the job that a worker was given by its claim number N; lives as long as a lease
--   tandem:job:ID      hash        the record
--   tandem:events:ID   stream      the job's transitions, steps and previews
--   tandem:previews:ID hash        a held job's previews, the latest of each image: field I holds the file, field
--                                  I:entry the stream's entry that tells of it
-- Records have no time to live of their own: the sweep deletes them after the job's pictures.
-- Channels: tandem:work:W rings when a job waits that worker W may take, tandem:events:ID when that stream grew,
-- tandem:webhooks when a call is due; with the job's id as the message, tandem:ended when it ended, tandem:cancel when a
-- held job is no longer wanted.
-- A preview's file lies beside the stream: a stream gives the memory of a deleted entry back only with its neighbours'.
--
-- ARGV of every script begins with three settings: the time to live of an ended job's record, that of a dead letter,
-- and the most attempts.

local SEQUENCE, RECORDS, QUEUE, LEASES = 'tandem:sequence', 'tandem:records', 'tandem:queue', 'tandem:leases'
local DEADLINES, ENDED, DEAD, WEBHOOKS = 'tandem:deadlines', 'tandem:ended', 'tandem:dead', 'tandem:webhooks'
local ROUNDS, ROUND, WAITING, UNFINISHED = 'tandem:rounds', 'tandem:round', 'tandem:waiting', 'tandem:unfinished'
local WORKERS, ALIVE, SILENT, LINES = 'tandem:workers', 'tandem:alive', 'tandem:silent', 'tandem:line:'
local TTL_MS, DEAD_TTL_MS, MAX_ATTEMPTS = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local AFTER_INTERACTIVE = 2 ^ 50

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- The jobs that this script ended, as {state, milliseconds since submission, 1 for a dead letter, template, arm}: first
-- half of every script's answer. What was ordered without a template has '' for the two.
local ended = {}

local function job_key(id) return 'tandem:job:' .. id end
local function events_key(id) return 'tandem:events:' .. id end
local function previews_key(id) return 'tandem:previews:' .. id end
local function order_key(name) return 'tandem:order:' .. name end
local function owner_key(owner) return 'tandem:owner:' .. owner end
local function allowance_key(owner) return 'tandem:allowance:' .. owner end
local function standby_key(model) return 'tandem:standby:' .. model end
local function claim_key(worker, number) return 'tandem:claim:' .. worker .. ':' .. number end
local function exists(id) return redis.call('EXISTS', job_key(id)) == 1 end
local function get(id, ...) return unpack(redis.call('HMGET', job_key(id), ...)) end
local function set(id, ...) redis.call('HSET', job_key(id), ...) end
local function number(value) return string.format('%.17g', value) end

-- A counter that is gone at zero.
local function count(key, field, by)
  local left = redis.call('HINCRBY', key, field, by)
  if left <= 0 then redis.call('HDEL', key, field) end
  return left
end

-- The record's state and step become the newest entry of its stream.
local function emit(id)
  local state, step, steps, attempt, fence = get(id, 'state', 'step', 'steps', 'attempt', 'fence')
  redis.call('XADD', events_key(id), '*', 'state', state, 'step', step, 'steps', steps, 'attempt', attempt,
      'fence', fence)
  redis.call('PUBLISH', events_key(id), '')
end

-- The end is told to a client: `told` in the record is the first time. Who asks a minute later did not wait for it. It is
-- worth no failure, as of a Redis that is full.
local function tell_end(id, finished)
  if now - finished <= 60000 then redis.pcall('HSETNX', job_key(id), 'told', now) end
end

-- Previews of an attempt that is over are nobody's news.
local function forget_previews(id)
  for _, field in ipairs(redis.call('HKEYS', previews_key(id))) do
    if string.find(field, ':entry', 1, true) then
      redis.call('XDEL', events_key(id), redis.call('HGET', previews_key(id), field))
    end
  end
  redis.call('DEL', previews_key(id))
end

-- What waits for a model, by owner.
local function tally(model, owner, jobs, ms)
  local key, mine, its = LINES .. model, 'jobs:' .. owner, 'ms:' .. owner
  local left = redis.call('HINCRBY', key, mine, jobs)
  redis.call('HINCRBY', key, its, ms)
  redis.call('HINCRBY', key, 'ms', ms)
  if left == jobs then redis.call('HINCRBY', key, 'owners', 1) end
  if left <= 0 then
    redis.call('HDEL', key, mine, its)
    redis.call('HINCRBY', key, 'owners', -1)
  end
  if redis.call('HINCRBY', key, 'jobs', jobs) <= 0 then redis.call('DEL', key) end
end

-- Fair queueing: deficit round robin (Shreedhar & Varghese 1996) between owners with an infinitely small quantum, so
-- that it needs no turns: a round gives every owner with queued jobs its weight in milliseconds, and a job is claimed in
-- the round that has paid for it. An owner's deficit is what the rounds since `tandem:rounds` have brought. Who comes
-- back brings no savings along, nor does who waited for a worker that could not take their jobs: no job is of an earlier
-- round than the latest claim. A job that is started again was paid for.
local function round_of(id, paid)
  local cost, weight, fence = get(id, 'cost', 'weight', 'fence')
  local price = fence == '0' and tonumber(cost) / tonumber(weight) or 0
  return math.max(paid + price, tonumber(redis.call('GET', ROUND) or 0))
end

-- A few of those that stand by for such a job are told: idle ones, else some that hold others, else some that only take
-- what others leave; of each kind those with the least room for it, of these by lot. Were all told, each order would cost
-- a claim of every idle worker of the fleet. Two are, because the first may have died a moment ago; whom nobody hears for is
-- passed over. Who was told stands by no more until it has looked. Whether a worker reads the job's schema and has the
-- memory that its mark asks for is not known here: such a job may have to wait for one that looks of itself.
local TOLD, HOLDING, FULL, STANDBY_MS = 2, 2 ^ 40, 2 ^ 41, 60000
local function tell_workers(model, pixels)
  local key, told = standby_key(model), 0
  for _, kind in ipairs({0, HOLDING, FULL}) do
    local worker = nil
    repeat
      worker = redis.call('ZRANGEBYSCORE', key, kind + pixels, kind + HOLDING - 1, 'LIMIT', 0, 1)[1]
      if worker then
        redis.call('ZREM', key, worker)
        told = told + redis.call('PUBLISH', 'tandem:work:' .. worker, '')
      end
    until not worker or told >= TOLD
    if told > 0 then return end
  end
end

-- `waiting` is when the job last joined the queue: for how long no idle worker has taken it.
local function enqueue(id)
  local owner, model, cost, sequence, priority, pixels =
      get(id, 'owner', 'model', 'cost', 'sequence', 'priority', 'pixels')
  set(id, 'waiting', now)
  if redis.call('HINCRBY', WAITING, owner, 1) == 1 then
    redis.call('ZADD', ROUNDS, redis.call('GET', ROUND) or 0, owner)
  end
  tally(model, owner, 1, cost)
  redis.call('ZADD', QUEUE, sequence + (priority == 'batch' and AFTER_INTERACTIVE or 0), id)
  emit(id)
  tell_workers(model, tonumber(pixels or 0))
end

local function dequeue(id)
  if redis.call('ZREM', QUEUE, id) == 0 then return end
  local owner, model, cost = get(id, 'owner', 'model', 'cost')
  if count(WAITING, owner, -1) <= 0 then redis.call('ZREM', ROUNDS, owner) end
  tally(model, owner, -1, -cost)
  if redis.call('ZCARD', QUEUE) == 0 then redis.call('DEL', ROUND) end
end

-- Back to the job's old place in the queue, to be claimed after `delay` milliseconds.
local function requeue(id, delay)
  redis.call('ZREM', LEASES, id)
  forget_previews(id)
  redis.call('HDEL', job_key(id), 'worker', 'started')
  set(id, 'state', 'queued', 'step', 0, 'not_before', now + delay)
  enqueue(id)
end

-- The only way into a terminal state. `...` are further fields of the record.
local function finish(id, state, dead, ...)
  local owner, created, webhook, sequence = get(id, 'owner', 'created', 'webhook', 'sequence')
  dequeue(id)
  redis.call('ZREM', LEASES, id)
  redis.call('ZREM', DEADLINES, id)
  count(UNFINISHED, owner, -1)
  forget_previews(id)
  set(id, 'state', state, 'finished', now, ...)
  emit(id)
  redis.call('ZADD', ENDED, now + (dead and DEAD_TTL_MS or TTL_MS), id)
  if dead then redis.call('ZADD', DEAD, sequence, id) end
  if webhook then
    set(id, 'webhook_state', 'pending')
    redis.call('ZADD', WEBHOOKS, now, id)
    redis.call('PUBLISH', WEBHOOKS, '')
  end
  redis.call('PUBLISH', ENDED, id)
  local template, arm = get(id, 'template', 'arm')
  ended[#ended + 1] = {state, now - created, dead and 1 or 0, template or '', arm or ''}
end

-- Nothing is left to be said of an id whose record somebody deleted. What it counted for is counted anew.
local function forget_lost(id)
  for _, index in ipairs({RECORDS, QUEUE, LEASES, DEADLINES, ENDED, DEAD, WEBHOOKS}) do redis.call('ZREM', index, id) end
  for _, owner in ipairs(redis.call('HKEYS', UNFINISHED)) do redis.call('ZREM', owner_key(owner), id) end
  redis.call('DEL', events_key(id), previews_key(id), WAITING, UNFINISHED, unpack(redis.call('KEYS', LINES .. '*')))
  for _, other in ipairs(redis.call('ZRANGE', DEADLINES, 0, -1)) do
    if exists(other) then count(UNFINISHED, get(other, 'owner'), 1) end
  end
  for _, other in ipairs(redis.call('ZRANGE', QUEUE, 0, -1)) do
    if exists(other) then
      local owner, model, cost = get(other, 'owner', 'model', 'cost')
      count(WAITING, owner, 1)
      tally(model, owner, 1, cost)
    end
  end
  for _, owner in ipairs(redis.call('ZRANGE', ROUNDS, 0, -1)) do
    if redis.call('HEXISTS', WAITING, owner) == 0 then redis.call('ZREM', ROUNDS, owner) end
  end
  if redis.call('ZCARD', QUEUE) == 0 then redis.call('DEL', ROUND) end
end

-- An attempt ended without a result: once more, unless the client no longer wants it or the attempts are used up.
local function retry(id, delay, error)
  local attempt, cancel = get(id, 'attempt', 'cancel')
  if cancel then
    finish(id, 'cancelled', false)
  elseif tonumber(attempt) < MAX_ATTEMPTS then
    requeue(id, delay)
  else
    finish(id, 'failed', true, 'error', error)
  end
end

local HELD = {encoding = 1, running = 2, storing = 3}

-- Fencing: `fence` is the number of the claim. A later claim of the job has a higher one.
local function holds(id, fence)
  local state, current = get(id, 'state', 'fence')
  return HELD[state] ~= nil and current == fence
end

-- The queued jobs of a model in the order in which they will be claimed, as {round, id, cost, rows}.
local function line(model)
  local paid, jobs = {}, {}
  for place, id in ipairs(redis.call('ZRANGE', QUEUE, 0, -1)) do
    local its, owner, cost, rows = get(id, 'model', 'owner', 'cost', 'rows')
    if its == model then
      paid[owner] = round_of(id, paid[owner] or tonumber(redis.call('ZSCORE', ROUNDS, owner) or 0))
      jobs[#jobs + 1] = {paid[owner], id, cost, rows, place}
    end
  end
  table.sort(jobs, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[5] < b[5]) end)
  return jobs
end

-- Predicted milliseconds and images that are left of the jobs of a model that workers hold, but for one, as a flat list.
-- Of more than MOST_HELD every second, third, ... stands for as many: each image in hand has the same share of the time, so
-- that twice the work on twice the images ends when each of two jobs does. Every order asks, of all that is held.
local MOST_HELD = 256
local function held(model, but)
  local left, ids = {}, redis.call('ZRANGE', LEASES, 0, -1)
  local stands_for = math.max(1, math.ceil(#ids / MOST_HELD))
  for n = 1, #ids, stands_for do
    local its, cost, rows, step, steps = get(ids[n], 'model', 'cost', 'rows', 'step', 'steps')
    if its == model and ids[n] ~= but then
      left[#left + 1] = math.floor(stands_for * cost * (1 - step / steps))
      left[#left + 1] = stands_for * rows
    end
  end
  return left
end

local BEHIND = 64

-- What an estimate of the job's end needs: its place, milliseconds and images of those before it, of at most BEHIND
-- after it, of those that are held. False for a job that has ended.
local function standing(id, state, model)
  if state ~= 'queued' then return HELD[state] ~= nil and {0, {}, {}, held(model, id)} end
  local place, ahead, behind = 0, {}, {}
  for n, job in ipairs(line(model)) do
    if job[2] == id then
      place = n
    elseif place == 0 or n - place <= BEHIND then
      local side = place == 0 and ahead or behind
      side[#side + 1] = job[3]
      side[#side + 1] = job[4]
    end
  end
  return {place, ahead, behind, held(model, id)}
end

local function snapshot(id)
  local state, model = get(id, 'state', 'model')
  return {redis.call('HGETALL', job_key(id)), state and standing(id, state, model)}
end

-- What an order's name (its id, or the key that its owner gave it) was used for before: 'taken' by another owner,
-- 'conflict' where it was another order, 'gone' where its record is, 'again' and the id of its job, or nil.
local function former(name, id, owner, fingerprint)
  local its, order, job = unpack(redis.call('HMGET', order_key(name), 'owner', 'fingerprint', 'job'))
  if job then
    if its ~= owner then return 'taken' end
    if order ~= fingerprint then return 'conflict' end
    return exists(job) and 'again' or 'gone', job
  elseif exists(id) then
    if get(id, 'owner') ~= owner then return 'taken' end
    return get(id, 'fingerprint') == fingerprint and 'again' or 'conflict', id
  end
end

-- The token buckets of an owner as they stand: requests a minute, milliseconds of a replica a day (-1 for no bound).
local MINUTE, DAY = 60000, 86400000
local function allowance(owner, requests, milliseconds)
  local buckets = {
    {name = 'requests_per_minute', size = tonumber(requests), window = MINUTE},
    {name = 'engine_s_per_day', size = tonumber(milliseconds), window = DAY},
  }
  for _, bucket in ipairs(buckets) do
    if bucket.size >= 0 then
      local left, at = unpack(redis.call('HMGET', allowance_key(owner), bucket.name, bucket.name .. ':at'))
      local back = at and math.max(0, now - at) * bucket.size / bucket.window or 0
      bucket.left = math.min(bucket.size, tonumber(left or bucket.size) + back)
    end
  end
  return buckets
end

-- {name, size, left, milliseconds until all is back} of every bound that there is.
local function limits_of(owner, buckets, most_unfinished)
  local told = {}
  for _, bucket in ipairs(buckets) do
    if bucket.size >= 0 then
      local reset = bucket.size > 0 and (bucket.size - bucket.left) * bucket.window / bucket.size or 0
      told[#told + 1] = {bucket.name, bucket.size, math.max(0, math.floor(bucket.left)), math.ceil(reset)}
    end
  end
  if most_unfinished >= 0 then
    local unfinished = tonumber(redis.call('HGET', UNFINISHED, owner) or 0)
    told[#told + 1] = {'max_unfinished', most_unfinished, math.max(0, most_unfinished - unfinished), 0}
  end
  return told
end

-- Why an order would be refused now, as the answer of submit.lua; nil where it would not.
local function refusal(owner, buckets, most_unfinished, model, cost, max_queued, max_ms)
  -- The caller's own bounds come first: who is over them is not told to come back when others have finished.
  local prices = {requests_per_minute = 1, engine_s_per_day = cost}
  for _, bucket in ipairs(buckets) do
    -- What costs more than the whole bucket is let in by a full one, and paid off later.
    local price = prices[bucket.name]
    local missing = bucket.size >= 0 and math.min(price, bucket.size) - bucket.left or 0
    if bucket.size == 0 or missing > 0 then
      local wait = bucket.size == 0 and bucket.window or missing * bucket.window / bucket.size
      return {'limited', bucket.name, math.ceil(wait), limits_of(owner, buckets, most_unfinished)}
    end
  end
  local unfinished = tonumber(redis.call('HGET', UNFINISHED, owner) or 0)
  if most_unfinished >= 0 and unfinished >= most_unfinished then
    return {'limited', 'max_unfinished', 0, limits_of(owner, buckets, most_unfinished)}
  end
  -- Beyond each bound there is room for half as much again, for those who have less than their share of what waits.
  local line = redis.call('HMGET', LINES .. model, 'jobs', 'ms', 'owners', 'jobs:' .. owner, 'ms:' .. owner)
  for i = 1, 5 do line[i] = tonumber(line[i] or 0) end
  local waiting, waiting_ms, owners, mine, mine_ms = unpack(line)
  if mine == 0 then owners = owners + 1 end
  local places = max_queued * (owners > 1 and mine < max_queued / owners and 1.5 or 1)
  local over_ms = waiting_ms + cost - max_ms * (owners > 1 and mine_ms + cost <= max_ms / owners and 1.5 or 1)
  -- An empty queue takes any job: there is nothing that it could wait for.
  if waiting >= places or (waiting_ms > 0 and over_ms > 0) then
    return {'full', waiting_ms, math.max(0, math.ceil(over_ms))}
  end
end
