"""The Lua scripts of the store of responses: see store.py, which also has the keys. No I/O.

KEYS is not used: the keys of a response that has to go are known by what is kept. Plain server, no cluster.
"""

# What every script begins with. ARGV: NS, NAME. A NAME is TENANT:ID, and an ID has no colon.
_HOLDINGS = """
local ns, name = ARGV[1], ARGV[2]
local order, sizes, holders = ns .. ':responses', ns .. ':response-sizes', ns .. ':response-holders'
local function key(one) return ns .. ':response:' .. one end
local function holder(one) return string.match(one, '^(.*):') end
local function order_of(tenant) return order .. ':' .. tenant end

local function resize(one, size) -- it takes up that many bytes from now on
  local more = size - (tonumber(redis.call('HGET', sizes, one)) or 0)
  redis.call('HSET', sizes, one, size)
  redis.call('HINCRBY', sizes, '', more)
  redis.call('ZINCRBY', holders, more, holder(one))
end

local function forget(one)
  if redis.call('HEXISTS', sizes, one) == 1 then resize(one, 0) end
  redis.call('HDEL', sizes, one)
  redis.call('ZREMRANGEBYSCORE', holders, '-inf', 0)
  redis.call('ZREM', order, one)
  redis.call('ZREM', order_of(holder(one)), one)
  redis.call('DEL', key(one), key(one) .. ':events', key(one) .. ':runner')
end
"""

# What the scripts begin with that make responses larger. `make_room` decides what has to go: who holds most gives up
# its oldest. So nobody who holds less than an equal share of the store loses anything to others.
_ROOM = """
local function begin_anew()
  for _, tenant in ipairs(redis.call('ZRANGE', holders, 0, -1)) do redis.call('DEL', order_of(tenant)) end
  redis.call('DEL', order, sizes, holders)
end

local function make_room(most)
  while (tonumber(redis.call('HGET', sizes, '')) or 0) > most do
    local largest = redis.call('ZREVRANGE', holders, 0, 0)[1]
    local oldest = largest and redis.call('ZRANGE', order_of(largest), 0, 0)[1]
    if not oldest then return begin_anew() end
    forget(oldest)
  end
end

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2] -- microseconds: no two writes have the same
local ages = order_of(holder(name))
if redis.call('EXISTS', order, sizes, holders) < 3
  or redis.call('ZSCORE', holders, holder(name)) and redis.call('EXISTS', ages) == 0
then begin_anew() end -- the server has evicted a part of who holds what
for _, one in ipairs(redis.call('ZRANGEBYSCORE', order, '-inf', now, 'LIMIT', 0, 1000)) do forget(one) end

local function hold(size, ttl)
  resize(name, size)
  for _, index in ipairs({order, ages}) do redis.call('ZADD', index, now + 1000 * ttl, name) end
  for _, index in ipairs({order, ages, sizes, holders}) do
    if redis.call('PTTL', index) < ttl then redis.call('PEXPIRE', index, ttl) end
  end
end
"""

# ARGV: NS, NAME, bytes at most, bytes of this one, lifetime (ms), lease (ms; 0: its status is final), streamed
# (1 or ''), body, turns, then its events. Answers 1; 0 if it has been deleted meanwhile.
KEEP = f"""{_HOLDINGS}{_ROOM}
local most, size, ttl, lease = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local wish = redis.call('HGET', key(name), 'wish')
forget(name)
if wish == 'delete' then return 0 end
if size > most then return 1 end
redis.call('HSET', key(name), 'streamed', ARGV[7], 'body', ARGV[8], 'turns', ARGV[9])
if lease == 0 then redis.call('HSET', key(name), 'final', 1) end
for i = 10, #ARGV do redis.call('RPUSH', key(name) .. ':events', ARGV[i]) end
redis.call('PEXPIRE', key(name), ttl)
redis.call('PEXPIRE', key(name) .. ':events', ttl)
if lease > 0 then redis.call('SET', key(name) .. ':runner', 1, 'PX', lease) end
hold(size, ttl)
make_room(most)
return 1
"""

# ARGV: NS, NAME, lifetime (ms), lease (ms), body, a number, then the events from that number on, of one that is being
# made. Events that are there already are passed over; so is all of it, if the last KEEP was quicker. Answers what
# others wish of it: 'cancel', 'delete' or ''.
TEND = f"""{_HOLDINGS}
if redis.call('EXISTS', key(name)) == 0 or redis.call('HEXISTS', key(name), 'final') == 1 then return '' end
redis.call('HSET', key(name), 'body', ARGV[5])
local known = math.max(0, redis.call('LLEN', key(name) .. ':events') - tonumber(ARGV[6]))
for i = 7 + known, #ARGV do redis.call('RPUSH', key(name) .. ':events', ARGV[i]) end
redis.call('PEXPIRE', key(name), ARGV[3])
redis.call('PEXPIRE', key(name) .. ':events', ARGV[3])
redis.call('SET', key(name) .. ':runner', 1, 'PX', ARGV[4])
return redis.call('HGET', key(name), 'wish') or ''
"""

# ARGV: NS, NAME, 'cancel' or 'delete'. Answers 0: there is no such response; 1: nobody makes it any more, and it is
# deleted if that was the wish; 2: whoever makes it will see the wish.
WISH = f"""{_HOLDINGS}
if redis.call('EXISTS', key(name)) == 0 or redis.call('HGET', key(name), 'wish') == 'delete' then return 0 end
if redis.call('EXISTS', key(name) .. ':runner') == 1 then
  redis.call('HSET', key(name), 'wish', ARGV[3])
  return 2
end
if ARGV[3] == 'delete' then forget(name) end
return 1
"""
