-- ARGV: settings. What has not ended, by model: {model, milliseconds of work that wait, milliseconds for which the job has
-- waited that joined the queue first, then states and their jobs, by turns}. One pass over what waits and is held.
local models, told = {}, {}

local function of(model)
  models[model] = models[model] or {ms = 0, since = now, queued = 0, encoding = 0, running = 0, storing = 0}
  return models[model]
end

for _, id in ipairs(redis.call('ZRANGE', QUEUE, 0, -1)) do
  local model, cost, since = get(id, 'model', 'cost', 'waiting')
  if model then
    local its = of(model)
    its.queued, its.ms, its.since = its.queued + 1, its.ms + cost, math.min(its.since, since or now)
  end
end
for _, id in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do
  local model, state = get(id, 'model', 'state')
  if model and HELD[state] then of(model)[state] = of(model)[state] + 1 end
end
for model, its in pairs(models) do
  local mine = {model, its.ms, now - its.since}
  for _, state in ipairs({'queued', 'encoding', 'running', 'storing'}) do
    mine[#mine + 1] = state
    mine[#mine + 1] = its[state]
  end
  told[#told + 1] = mine
end
return {ended, told}
