-- ARGV: settings, number of the latest submission that was counted as having arrived (-1 for none yet), then for each model
-- that is asked for: its name, how many bounds follow, and the bounds in pixels, rising.
-- Answers {number of the latest submission, bands}. A band is the work of a model on images up to a bound and above the
-- one before (0 below the first): {model, number of the bound, memory that the jobs ran out of (0 for none), milliseconds
-- that wait, milliseconds that are left of what is held, jobs that wait or are held, milliseconds that arrived}. Bands
-- with nothing in them are left out. One pass over what waits, is held and has arrived; of the submissions that
-- nobody has asked after for long, a part stands for all.
local last, bounds, bands, order, MOST_NEW = tonumber(ARGV[4]), {}, {}, {}, 10000
local place = 5
while place <= #ARGV do
  local its, n = {}, tonumber(ARGV[place + 1])
  for i = 1, n do its[i] = tonumber(ARGV[place + 1 + i]) end
  bounds[ARGV[place]], place = its, place + 2 + n
end

-- Nothing for work of no model or size that is asked for.
local function band_of(model, pixels, mark)
  for n, upto in ipairs(bounds[model or ''] or {}) do
    if tonumber(pixels) <= upto then
      local memory = tonumber(mark or 0)
      local key = n .. ':' .. memory .. ':' .. model
      if not bands[key] then
        bands[key] = {model, n, memory, 0, 0, 0, 0}
        order[#order + 1] = bands[key]
      end
      return bands[key]
    end
  end
end

for _, id in ipairs(redis.call('ZRANGE', QUEUE, 0, -1)) do
  local model, pixels, mark, cost = get(id, 'model', 'pixels', 'above_mb', 'cost')
  local band = band_of(model, pixels, mark)
  if band then band[4], band[6] = band[4] + cost, band[6] + 1 end
end
for _, id in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do
  local model, pixels, mark, cost, step, steps = get(id, 'model', 'pixels', 'above_mb', 'cost', 'step', 'steps')
  local band = band_of(model, pixels, mark)
  if band then band[5], band[6] = band[5] + math.floor(cost * (1 - step / steps)), band[6] + 1 end
end
local latest = tonumber(redis.call('GET', SEQUENCE) or 0)
if last >= 0 and last < latest then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', RECORDS, '(' .. last, '+inf', 'LIMIT', 0, MOST_NEW)) do
    local model, pixels, cost = get(id, 'model', 'pixels', 'cost')
    local band = band_of(model, pixels, 0)
    if band then band[7] = band[7] + cost end
  end
end
return {ended, {latest, order}}
