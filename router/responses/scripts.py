"""The Lua scripts of the store of responses: see store.py, which also has the keys. No I/O.

KEYS is not used: the keys of a response that has to go are known by what is kept. Plain server, no cluster.
"""

# Takes a response out of Redis, and what it took up out of the total.
_FORGET = """
local ns, id = ARGV[1], ARGV[2]
local order, sizes = ns .. ':responses', ns .. ':response-sizes'
local function key(name) return ns .. ':response:' .. name end
local function forget(name)
  local size = redis.call('HGET', sizes, name)
  if size then redis.call('HINCRBY', sizes, '', '-' .. size) end
  redis.call('HDEL', sizes, name)
  redis.call('ZREM', order, name)
  redis.call('DEL', key(name), key(name) .. ':events', key(name) .. ':runner')
end
"""

# ARGV: NS, id, bytes at most, bytes of this one, lifetime (ms), lease (ms; 0: its status is final), tenant, streamed
# (1 or ''), body, turns, then its events. The oldest go until all fit. Answers 1; 0 if it has been deleted meanwhile.
KEEP = f"""{_FORGET}
local most, size, ttl, lease = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if redis.call('EXISTS', order) == 0 then redis.call('DEL', sizes) end -- the server has evicted what says who is old
for _, name in ipairs(redis.call('ZRANGEBYSCORE', order, '-inf', now)) do forget(name) end
local wish = redis.call('HGET', key(id), 'wish')
forget(id)
if wish == 'delete' then return 0 end
if size > most then return 1 end
redis.call('HSET', key(id), 'tenant', ARGV[7], 'streamed', ARGV[8], 'body', ARGV[9], 'turns', ARGV[10])
if lease == 0 then redis.call('HSET', key(id), 'final', 1) end
for i = 11, #ARGV do redis.call('RPUSH', key(id) .. ':events', ARGV[i]) end
redis.call('PEXPIRE', key(id), ttl)
redis.call('PEXPIRE', key(id) .. ':events', ttl)
if lease > 0 then redis.call('SET', key(id) .. ':runner', 1, 'PX', lease) end
redis.call('ZADD', order, now + ttl, id)
redis.call('HSET', sizes, id, size)
redis.call('HINCRBY', sizes, '', size)
for _, whole in ipairs({{order, sizes}}) do
  if redis.call('PTTL', whole) < ttl then redis.call('PEXPIRE', whole, ttl) end
end
while tonumber(redis.call('HGET', sizes, '')) > most do
  forget(redis.call('ZRANGE', order, 0, 0)[1])
end
return 1
"""

# ARGV: NS, id, lifetime (ms), lease (ms), body, a number, then the events from that number on, of one that is being
# made. Events that are there already are passed over; so is all of it, if the last KEEP was quicker. Answers what
# others wish of it: 'cancel', 'delete' or ''.
TEND = f"""{_FORGET}
if redis.call('EXISTS', key(id)) == 0 or redis.call('HEXISTS', key(id), 'final') == 1 then return '' end
redis.call('HSET', key(id), 'body', ARGV[5])
local known = math.max(0, redis.call('LLEN', key(id) .. ':events') - tonumber(ARGV[6]))
for i = 7 + known, #ARGV do redis.call('RPUSH', key(id) .. ':events', ARGV[i]) end
redis.call('PEXPIRE', key(id), ARGV[3])
redis.call('PEXPIRE', key(id) .. ':events', ARGV[3])
redis.call('SET', key(id) .. ':runner', 1, 'PX', ARGV[4])
return redis.call('HGET', key(id), 'wish') or ''
"""

# ARGV: NS, id, tenant, 'cancel' or 'delete'. Answers 0: there is no such response; 1: nobody makes it any more, and it
# is deleted if that was the wish; 2: whoever makes it will see the wish.
WISH = f"""{_FORGET}
if redis.call('HGET', key(id), 'tenant') ~= ARGV[3] or redis.call('HGET', key(id), 'wish') == 'delete' then return 0 end
if redis.call('EXISTS', key(id) .. ':runner') == 1 then
  redis.call('HSET', key(id), 'wish', ARGV[4])
  return 2
end
if ARGV[4] == 'delete' then forget(id) end
return 1
"""
