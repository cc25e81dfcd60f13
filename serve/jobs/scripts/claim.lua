-- ARGV: ttl, worker, lease, then the models that the worker serves.
-- Leases the first queued job among them that still has time; the sweep ends those that have none.
local worker, lease, PAGE = ARGV[2], tonumber(ARGV[3]), 100
local serves = {}
for i = 4, #ARGV do serves[ARGV[i]] = true end

local function first()
  local page, ids = 0, nil
  repeat
    ids = redis.call('ZRANGE', QUEUE, page * PAGE, (page + 1) * PAGE - 1)
    for _, id in ipairs(ids) do
      if serves[get(id, 'model')] and tonumber(redis.call('ZSCORE', DEADLINES, id)) > now then return id end
    end
    page = page + 1
  until #ids < PAGE
end

local id = first()
if not id then return {ended, false} end
redis.call('ZREM', QUEUE, id)
redis.call('ZADD', LEASES, now + lease, id)
local attempt = redis.call('HINCRBY', job_key(id), 'attempt', 1)
local fence = redis.call('HINCRBY', job_key(id), 'fence', 1)
set(id, 'state', 'running', 'step', 0, 'started', now, 'worker', worker)
emit(id)
return {ended, {id, attempt, fence, get(id, 'request', 'truncated')}}
