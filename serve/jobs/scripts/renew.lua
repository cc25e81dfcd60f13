-- ARGV: settings, lease, then id, fence, step and state of each claim. Answers, for each, 'held', 'cancel' or 'lost'.
-- Neither step nor state goes back.
local lease, answers = tonumber(ARGV[4]), {}
for i = 5, #ARGV, 4 do
  local id, fence, step, state = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3]
  local answer = 'lost'
  if holds(id, fence) then
    local before, done, steps, cancel = get(id, 'state', 'step', 'steps', 'cancel')
    redis.call('ZADD', LEASES, now + lease, id)
    local further = HELD[state] > HELD[before]
    if further then set(id, 'state', state) end
    if step > tonumber(done) then set(id, 'step', math.min(step, tonumber(steps))) end
    if further or step > tonumber(done) then emit(id) end
    answer = cancel and 'cancel' or 'held'
  end
  answers[#answers + 1] = answer
end
return {ended, answers}
