-- ARGV: settings, worker, lease, time from the first claim until it expires, 1 where the worker holds nothing, then
-- model, above, upto and least milliseconds of waiting of each want, in order.
-- Leases the queued job that satisfies the first want which any of them satisfies; of those, the one whose round comes
-- first, and of one round the oldest. Of an owner's jobs that satisfy a want the first in the queue stands for all. A job
-- satisfies a want when it is for the want's model, has more than `above` and at most `upto` pixels, has waited so long
-- since it last joined the queue, may be started by now, and still has time; the sweep ends those that have none. An id
-- whose record somebody deleted satisfies nothing: the sweep forgets it.
-- The last attempt of a job that has lost a worker is made alone: should it be the job that kills them, it takes nobody
-- along. A worker that holds others is told to wait: 'alone'.
local worker, lease, timeout, idle = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7] == '1'
local wants = {}
for i = 8, #ARGV, 4 do
  wants[#wants + 1] = {
    model = ARGV[i], above = tonumber(ARGV[i + 1]), upto = tonumber(ARGV[i + 2]), waited = tonumber(ARGV[i + 3])
  }
end

local function satisfies(want, model, pixels, waited)
  return model == want.model and pixels > want.above and pixels <= want.upto and waited >= want.waited
end

local paid, seen, PAGE = {}, {}, 100
local found, rank, round = nil, #wants + 1, nil

-- What was found only gives way to a job of an earlier want, or of the same want and an earlier round.
local function consider(id)
  local model, pixels, since, owner, not_before = get(id, 'model', 'pixels', 'waiting', 'owner', 'not_before')
  if not model or tonumber(not_before or 0) > now or tonumber(redis.call('ZSCORE', DEADLINES, id)) <= now then return end
  for n = 1, math.min(rank, #wants) do
    if satisfies(wants[n], model, tonumber(pixels), now - since) then
      if seen[n .. owner] then return end
      seen[n .. owner] = true
      paid[owner] = paid[owner] or tonumber(redis.call('ZSCORE', ROUNDS, owner))
      local its = paid[owner] + rounds_of(id)
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
if not found then return {ended, false} end

local id = found
local owner, attempt, lost, fence = get(id, 'owner', 'attempt', 'lost', 'fence')
local alone = tonumber(lost) > 0 and tonumber(attempt) == MAX_ATTEMPTS - 1
if alone and not idle then return {ended, 'alone'} end
dequeue(id)
if redis.call('HEXISTS', WAITING, owner) == 1 then redis.call('ZADD', ROUNDS, number(round), owner) end
if redis.call('ZCARD', QUEUE) > 0 then
  redis.call('SET', ROUND, number(math.max(round, tonumber(redis.call('GET', ROUND) or 0))))
end
redis.call('ZADD', LEASES, now + lease, id)
if fence == '0' then redis.call('ZADD', DEADLINES, now + timeout, id) end
attempt = redis.call('HINCRBY', job_key(id), 'attempt', 1)
fence = redis.call('HINCRBY', job_key(id), 'fence', 1)
set(id, 'state', 'encoding', 'step', 0, 'started', now, 'worker', worker)
redis.call('HDEL', job_key(id), 'not_before')
emit(id)
return {ended, {id, attempt, fence, alone and 1 or 0, get(id, 'cost', 'request', 'truncated')}}
