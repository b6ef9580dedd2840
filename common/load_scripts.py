"""The Lua scripts about what routers have reserved: see reservations.py, which also has the keys. No I/O."""

# Sums up the others' loads, and counts the others. A router without a key is gone: its lease has run out.
RESERVED_BY_OTHERS = """
local function reserved_by_others(prefix, me)
  local reserved, others = {}, 0
  for _, router in ipairs(redis.call('SMEMBERS', prefix .. ':routers')) do
    if router ~= me then
      local load = redis.call('HGETALL', prefix .. ':load:' .. router)
      if #load == 0 then redis.call('SREM', prefix .. ':routers', router) else others = others + 1 end
      for i = 1, #load, 2 do
        if load[i] ~= '' then reserved[load[i]] = (reserved[load[i]] or 0) + tonumber(load[i + 1]) end
      end
    end
  end
  return reserved, others
end
"""

# KEYS: NS:load:ROUTER, NS:routers. ARGV: NS, ROUTER, lease (ms), then incarnation, tokens, ... of this router's load.
# Answers incarnation, tokens, ... of the other routers' load.
WRITE_LOAD = f"""{RESERVED_BY_OTHERS}
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], '', 0, unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('PEXPIRE', KEYS[2], 10 * ARGV[3])
local answer, reserved = {{}}, reserved_by_others(ARGV[1], ARGV[2])
for incarnation, tokens in pairs(reserved) do
  answer[#answer + 1], answer[#answer + 2] = incarnation, tokens
end
return answer
"""
