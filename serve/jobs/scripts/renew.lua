-- ARGV: ttl, lease, then id, fence and step of each claim. Answers, for each, 'held', 'cancel' or 'lost'.
local lease, answers = tonumber(ARGV[2]), {}
for i = 3, #ARGV, 3 do
  local id, fence, step = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  local answer = 'lost'
  if holds(id, fence) then
    local before, steps, cancel = get(id, 'step', 'steps', 'cancel')
    redis.call('ZADD', LEASES, now + lease, id)
    if step > tonumber(before) then
      set(id, 'step', math.min(step, tonumber(steps)))
      emit(id)
    end
    answer = cancel and 'cancel' or 'held'
  end
  answers[#answers + 1] = answer
end
return {ended, answers}
