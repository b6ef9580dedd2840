"""The Lua scripts of the store of responses: see store.py, which also has the keys. No I/O.

KEYS is not used: the keys of a response that has to go are known by what is kept. Plain server, no cluster.
"""

# What every script begins with. ARGV: NS, NAME. A NAME is TENANT:ID, and an ID has no colon.
_HOLDINGS = """
local ns, name = ARGV[1], ARGV[2]
local order, sizes, holders = ns .. ':responses', ns .. ':response-sizes', ns .. ':response-holders'
local function key(one) return ns .. ':response:' .. one end
local function holder(one) return string.match(one, '^(.*):') or '' end -- '': of a router before tenants were named
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
  redis.call('DEL', key(one), key(one) .. ':log', key(one) .. ':runner')
  redis.call('PUBLISH', key(one), '')
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

# ARGV: NS, NAME, bytes at most, lifetime (ms), lease (ms; 0: its status is final), streamed (1 or ''), a number of
# bytes, the log from there on, body, turns (both '' with a lease). Where the log is written twice it is the same.
# Answers {answer, followers}: what others wish of it: 'cancel', 'delete' or ''; 'lost': what comes before is not there.
WRITE = f"""{_HOLDINGS}{_ROOM}
local most, ttl, lease, streamed = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local offset, piece, body, turns = tonumber(ARGV[7]), ARGV[8], ARGV[9], ARGV[10]
local log, runner = key(name) .. ':log', key(name) .. ':runner'
local wish, final = unpack(redis.call('HMGET', key(name), 'wish', 'final'))
if lease > 0 and final then return {{'', 0}} end -- the last write was quicker
if offset > 0 and (redis.call('EXISTS', key(name)) == 0 or redis.call('STRLEN', log) < offset) then
  forget(name)
  return {{'lost', 0}}
end
if lease == 0 and wish == 'delete' then
  forget(name)
  return {{wish, 0}}
end
if lease > 0 or streamed ~= '' then redis.call('SETRANGE', log, offset, piece) else redis.call('DEL', log) end
redis.call('HSET', key(name), 'streamed', streamed, 'body', body, 'turns', turns)
if lease > 0 then
  redis.call('SET', runner, 1, 'PX', lease)
else
  redis.call('HSET', key(name), 'final', 1)
  redis.call('DEL', runner)
end
redis.call('PEXPIRE', key(name), ttl)
redis.call('PEXPIRE', log, ttl)
local size = #body + #turns + redis.call('STRLEN', log)
if size > most then
  forget(name)
else
  hold(size, ttl)
  make_room(most)
end
local news = #piece > 0 or lease == 0
return {{wish or '', news and redis.call('PUBLISH', key(name), '') or 0}}
"""

# ARGV: NS, NAME, a number of bytes; '': no log of one whose status is final. Answers {final, streamed, body, turns,
# what is left of the lease (ms; below 0: nobody makes it), the log from there on}; {} if there is no such response.
READ = f"""{_HOLDINGS}
local log = key(name) .. ':log'
local wish, final, streamed, body, turns = unpack(
  redis.call('HMGET', key(name), 'wish', 'final', 'streamed', 'body', 'turns'))
if not streamed or wish == 'delete' or not final and redis.call('EXISTS', log) == 0 then return {{}} end
local events = ''
if not final or ARGV[3] ~= '' then events = redis.call('GETRANGE', log, tonumber(ARGV[3]) or 0, -1) end
return {{final and 1 or 0, streamed, body, turns, redis.call('PTTL', key(name) .. ':runner'), events}}
"""

# ARGV: NS, NAME, 'cancel' or 'delete'. Answers 0: there is no such response; 1: nobody makes it any more, and it is
# deleted if that was the wish; 2: whoever makes it will see the wish.
WISH = f"""{_HOLDINGS}
if redis.call('EXISTS', key(name)) == 0 or redis.call('HGET', key(name), 'wish') == 'delete' then return 0 end
if redis.call('EXISTS', key(name) .. ':runner') == 1 then
  redis.call('HSET', key(name), 'wish', ARGV[3])
  redis.call('PUBLISH', key(name) .. ':wish', '')
  return 2
end
if ARGV[3] == 'delete' then forget(name) end
return 1
"""
