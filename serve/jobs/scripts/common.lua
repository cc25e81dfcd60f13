-- Stands in front of every script. A script is one atomic step: Redis runs nothing else meanwhile.
--
-- Keys. Every key is one of the three indexes and the counter, or belongs to one job:
--   tandem:queue      sorted set  job id -> sequence number     exactly the queued jobs
--   tandem:leases     sorted set  job id -> end of the lease    exactly the running jobs
--   tandem:deadlines  sorted set  job id -> end of its time     exactly the jobs that have not ended
--   tandem:sequence   counter     number of the latest submission
--   tandem:job:ID     hash        the record; has a time to live once the job has ended
--   tandem:events:ID  stream      the job's transitions, steps and previews; has the same time to live
--   tandem:previews:ID  hash      a running job's previews, the latest of each image: field I holds the file, field
--                                 I:entry the stream's entry that tells of it
-- Channels: tandem:work rings when a job waits, tandem:events:ID when that stream grew, tandem:cancel:ID when a running
-- job is no longer wanted.
-- A preview's file lies beside the stream: a stream gives the memory of a deleted entry back only with its neighbours'.
-- All times are milliseconds of this server's clock. ARGV[1] is the time to live of an ended job's record.

local QUEUE, LEASES, DEADLINES = 'tandem:queue', 'tandem:leases', 'tandem:deadlines'
local TTL_MS = tonumber(ARGV[1])

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- The jobs that this script ended, as {state, milliseconds since submission}: second half of every script's answer.
local ended = {}

local function job_key(id) return 'tandem:job:' .. id end
local function events_key(id) return 'tandem:events:' .. id end
local function previews_key(id) return 'tandem:previews:' .. id end
local function cancel_channel(id) return 'tandem:cancel:' .. id end
local function exists(id) return redis.call('EXISTS', job_key(id)) == 1 end
local function get(id, ...) return unpack(redis.call('HMGET', job_key(id), ...)) end
local function set(id, ...) redis.call('HSET', job_key(id), ...) end

-- The record's state and step become the newest entry of its stream.
local function emit(id)
  local state, step, steps = get(id, 'state', 'step', 'steps')
  redis.call('XADD', events_key(id), '*', 'state', state, 'step', step, 'steps', steps)
  redis.call('PUBLISH', events_key(id), '')
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

-- `waiting` is when the job last joined the queue: for how long no idle worker has taken it.
local function enqueue(id)
  set(id, 'waiting', now)
  redis.call('ZADD', QUEUE, get(id, 'sequence'), id)
  emit(id)
  redis.call('PUBLISH', 'tandem:work', '')
end

-- Back to the job's old place in the queue.
local function requeue(id)
  redis.call('ZREM', LEASES, id)
  forget_previews(id)
  redis.call('HDEL', job_key(id), 'worker', 'started')
  set(id, 'state', 'queued', 'step', 0)
  enqueue(id)
end

-- The only way into a terminal state. `...` are further fields of the record.
local function finish(id, state, ...)
  redis.call('ZREM', QUEUE, id)
  redis.call('ZREM', LEASES, id)
  redis.call('ZREM', DEADLINES, id)
  forget_previews(id)
  set(id, 'state', state, 'finished', now, ...)
  emit(id)
  redis.call('PEXPIRE', job_key(id), TTL_MS)
  redis.call('PEXPIRE', events_key(id), TTL_MS)
  ended[#ended + 1] = {state, now - get(id, 'created')}
end

-- Nothing is left to be said of an id whose record somebody deleted.
local function forget(id)
  redis.call('ZREM', QUEUE, id)
  redis.call('ZREM', LEASES, id)
  redis.call('ZREM', DEADLINES, id)
  redis.call('DEL', events_key(id), previews_key(id))
end

-- An attempt ended without a result: once more, unless the client no longer wants it or the attempts are used up.
local function retry(id, max_attempts, error)
  local attempt, cancel = get(id, 'attempt', 'cancel')
  if cancel then
    finish(id, 'cancelled')
  elseif tonumber(attempt) < max_attempts then
    requeue(id)
  else
    finish(id, 'failed', 'error', error)
  end
end

-- Fencing: `fence` is the number of the claim. A later claim of the job has a higher one.
local function holds(id, fence)
  local state, current = get(id, 'state', 'fence')
  return state == 'running' and current == fence
end

local function snapshot(id)
  return {redis.call('HGETALL', job_key(id)), redis.call('ZRANK', QUEUE, id)}
end
