-- ARGV: ttl, worker, lease, then model, above, upto and least milliseconds of waiting of each want, in order.
-- Leases the oldest queued job that satisfies the first want which any of them satisfies. A job satisfies a want when it
-- is for the want's model, has more than `above` and at most `upto` pixels, has waited so long since it last joined the
-- queue, and still has time; the sweep ends those that have none. A record of an older version, which says no pixels,
-- counts as the smallest image. An id whose record somebody deleted satisfies nothing: the sweep forgets it.
local worker, lease, PAGE = ARGV[2], tonumber(ARGV[3]), 100
local wants = {}
for i = 4, #ARGV, 4 do
  wants[#wants + 1] = {
    model = ARGV[i], above = tonumber(ARGV[i + 1]), upto = tonumber(ARGV[i + 2]), waited = tonumber(ARGV[i + 3])
  }
end

local function satisfies(want, model, pixels, waited)
  return model == want.model and pixels > want.above and pixels <= want.upto and waited >= want.waited
end

-- One pass over the queue, oldest job first. What was found only gives way to a job of an earlier want.
local function choose()
  local found, rank, page, ids = nil, #wants + 1, 0, nil
  repeat
    ids = redis.call('ZRANGE', QUEUE, page * PAGE, (page + 1) * PAGE - 1)
    for _, id in ipairs(ids) do
      local model, pixels, since, created = get(id, 'model', 'pixels', 'waiting', 'created')
      local waited = now - tonumber(since or created or now)
      for n = 1, rank - 1 do
        if satisfies(wants[n], model, tonumber(pixels or 1), waited)
            and tonumber(redis.call('ZSCORE', DEADLINES, id) or now) > now then
          found, rank = id, n
          break
        end
      end
      if rank == 1 then return found end
    end
    page = page + 1
  until #ids < PAGE
  return found
end

local id = choose()
if not id then return {ended, false} end
redis.call('ZREM', QUEUE, id)
redis.call('ZADD', LEASES, now + lease, id)
local attempt = redis.call('HINCRBY', job_key(id), 'attempt', 1)
local fence = redis.call('HINCRBY', job_key(id), 'fence', 1)
set(id, 'state', 'running', 'step', 0, 'started', now, 'worker', worker)
emit(id)
return {ended, {id, attempt, fence, get(id, 'request', 'truncated')}}
