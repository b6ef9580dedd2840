"""The prefix index in Redis: which workers cache which pages. Layout, packing and the Lua scripts; no I/O.

    NS:pages:GENERATION:BUCKET   hash   6 bytes of a page hash -> the slots of its holders, 2 bytes each, ascending
    NS:slots                     hash   "generation" -> GENERATION, slot -> incarnation: who writes, or wrote, as what
    NS:index:INCARNATION         string "GENERATION:slot:seq": the worker's slot and the last batch it has written

A worker announces a page only while it announces the page before it (announcements.py). So what it holds of a prompt
ends at one place, and a look-up finds that place by bisection, for all workers together: one HGET tells for each of
them whether it is before or behind. The cost grows with the logarithm of the pages times the number of such places.

Fencing: a slot counts only for the incarnation whose NS:index key names it, and that key lives one lease. A slot whose
incarnation has gone is given to nobody before `SWEEP` has taken it out of every bucket. Should NS:slots be lost, the
next one begins another generation, and the old buckets are out of reach until they expire.

Collisions: bucket and field are 66 bits of the page hash. With ten million pages the odds that any two meet are
1e14 / 2^67 = 7e-7; then a prediction is wrong and nothing else: workers compare whole hashes.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.common.load_scripts import RESERVED_BY_OTHERS
from penstock.common.page_hash import DIGEST_BYTES

# 10 million pages are 38 a bucket: short enough to be searched in a row, long enough that a key's overhead is small.
BUCKET_BITS = 18
BUCKET_BYTES = 3
FIELD_BYTES = 6
PACKED_BYTES = BUCKET_BYTES + FIELD_BYTES
MAX_SLOTS = 1 << 16
BUCKET_TTL_S = 3600.0  # of a bucket in which nothing is written or announced again
REANNOUNCE_S = 600.0  # all pages of a worker are announced again within this time: heals losses, renews the TTLs
SWEEP_ENTRIES = 1000  # looked at by one call of `SWEEP`: about a millisecond
SWEEP_SLOTS = 16  # freed by one round
SWEEP_BUCKETS = 1024  # the same for empty ones
_MASK = bytes(byte & (1 << (BUCKET_BITS - 16)) - 1 for byte in range(256))


def pack(hashes: Sequence[bytes]) -> bytes:
    """Page hashes as the scripts take them: bucket and field, 9 bytes a page, back to back. 6000 pages: 0.2 ms."""
    joined = b"".join(hashes)
    packed = bytearray(len(hashes) * PACKED_BYTES)
    packed[0::PACKED_BYTES] = joined[0::DIGEST_BYTES].translate(_MASK)
    for i in range(1, PACKED_BYTES):
        packed[i::PACKED_BYTES] = joined[i::DIGEST_BYTES]
    return bytes(packed)


# Where `slot` is, or would be, in a string of slots (a position from 1), and whether it is there.
_LOCATE = """
local function locate(slots, slot)
  local low, high = 0, #slots / 2
  while low < high do
    local middle = math.floor((low + high) / 2)
    local a, b = string.byte(slots, 2 * middle + 1, 2 * middle + 2)
    local found = a * 256 + b
    if found == slot then return 2 * middle + 1, true end
    if found < slot then low = middle + 1 else high = middle end
  end
  return 2 * low + 1, false
end
"""

# KEYS: NS:index keys. ARGV: NS, this router, packed pages, then the incarnation of each key.
# Answers [pages held from the start, tokens reserved by other routers] for each key, then how many routers those are.
LOOK_UP = f"""{_LOCATE}{RESERVED_BY_OTHERS}
local prefix, me, pages = ARGV[1], ARGV[2], ARGV[3]
local reserved, others = reserved_by_others(prefix, me)
local answer, holders, slots = {{}}, {{}}, {{}}
answer[2 * #KEYS + 1] = others
local generation = redis.call('HGET', prefix .. ':slots', 'generation')
for i, owner in ipairs(redis.call('MGET', unpack(KEYS))) do
  answer[2 * i - 1], answer[2 * i] = 0, reserved[ARGV[3 + i]] or 0
  if owner then
    local of, slot = string.match(owner, '^(%x+):(%d+):')
    if of == generation then holders[#holders + 1], slots[i] = i, tonumber(slot) end
  end
end
local count = #pages / {PACKED_BYTES}
if not generation or count == 0 then return answer end
local buckets = prefix .. ':pages:' .. generation .. ':'
local function split(group, page)
  local at = (page - 1) * {PACKED_BYTES} + 1
  local found = redis.call('HGET', buckets .. string.sub(pages, at, at + {BUCKET_BYTES - 1}),
                           string.sub(pages, at + {BUCKET_BYTES}, at + {PACKED_BYTES - 1}))
  if not found then return {{}}, group end
  local have, lack = {{}}, {{}}
  for _, i in ipairs(group) do
    local _, there = locate(found, slots[i])
    if there then have[#have + 1] = i else lack[#lack + 1] = i end
  end
  return have, lack
end
local open = {{}}  -- {{pages that each of the group holds, pages that none holds more of, the group}}
local some, _ = split(holders, 1)
local all, part = split(some, count)
for _, i in ipairs(all) do answer[2 * i - 1] = count end
open[1] = {{1, count - 1, part}}
while #open > 0 do
  local low, high, group = unpack(table.remove(open))
  if low >= high then
    for _, i in ipairs(group) do answer[2 * i - 1] = low end
  elseif #group > 0 then
    local middle = math.ceil((low + high) / 2)
    local have, lack = split(group, middle)
    open[#open + 1] = {{middle, high, have}}
    open[#open + 1] = {{low, middle - 1, lack}}
  end
end
return answer
"""

# KEYS: NS:index:INCARNATION, NS:slots.
# ARGV: incarnation, lease (ms), TTL of NS:slots (ms), a generation should there be none; what the worker believes:
# generation, slot, seq of the last batch that was acknowledged (the next one may have been written as well).
# Answers [generation, slot, 1 if the slot is new: Redis holds none of the worker's pages under it].
REGISTER = f"""
local generation = redis.call('HGET', KEYS[2], 'generation')
local owner = redis.call('GET', KEYS[1])
local mine = ARGV[5] .. ':' .. ARGV[6] .. ':'
if owner and generation == ARGV[5] and redis.call('HGET', KEYS[2], ARGV[6]) == ARGV[1]
    and (owner == mine .. ARGV[7] or owner == mine .. (tonumber(ARGV[7]) + 1)) then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
  return {{generation, tonumber(ARGV[6]), 0}}
end
if not generation then
  generation = ARGV[4]
  redis.call('HSET', KEYS[2], 'generation', generation)
end
local slot = 0
while redis.call('HEXISTS', KEYS[2], slot) == 1 do slot = slot + 1 end
if slot >= {MAX_SLOTS} then return redis.error_reply('ERR no slot is left in the prefix index') end
redis.call('HSET', KEYS[2], slot, ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('SET', KEYS[1], generation .. ':' .. slot .. ':0', 'PX', ARGV[2])
return {{generation, slot, 1}}
"""

# KEYS: NS:index:INCARNATION. ARGV: NS, generation, slot, seq of this batch, TTL of buckets (ms), packed pages that
# the worker does not hold any more, packed pages that it holds.
# Answers how many of the latter were not there, or -1: not written, a batch before this one is missing, or the lease.
WRITE = f"""{_LOCATE}
local slot, seq = tonumber(ARGV[3]), tonumber(ARGV[4])
local mine = ARGV[2] .. ':' .. ARGV[3] .. ':'
local owner = redis.call('GET', KEYS[1])
if owner ~= mine .. (seq - 1) and owner ~= mine .. seq then return -1 end
local buckets = ARGV[1] .. ':pages:' .. ARGV[2] .. ':'
local function split(pages, at)
  return buckets .. string.sub(pages, at, at + {BUCKET_BYTES - 1}),
         string.sub(pages, at + {BUCKET_BYTES}, at + {PACKED_BYTES - 1})
end
for at = 1, #ARGV[6], {PACKED_BYTES} do
  local key, field = split(ARGV[6], at)
  local slots = redis.call('HGET', key, field)
  if slots then
    local where, there = locate(slots, slot)
    if there and #slots == 2 then
      redis.call('HDEL', key, field)
    elseif there then
      redis.call('HSET', key, field, string.sub(slots, 1, where - 1) .. string.sub(slots, where + 2))
    end
  end
end
local missing, me = 0, string.char(math.floor(slot / 256), slot % 256)
for at = 1, #ARGV[7], {PACKED_BYTES} do
  local key, field = split(ARGV[7], at)
  local slots = redis.call('HGET', key, field) or ''
  local where, there = locate(slots, slot)
  if not there then
    redis.call('HSET', key, field, string.sub(slots, 1, where - 1) .. me .. string.sub(slots, where))
    missing = missing + 1
  end
  redis.call('PEXPIRE', key, ARGV[5])
end
redis.call('SET', KEYS[1], mine .. seq, 'KEEPTTL')
return missing
"""

# KEYS: NS:index:INCARNATION, NS:slots, NS:sweeper. ARGV: incarnation, slot, what NS:index says if all its pages were
# removed: then the slot is free at once, else a sweep will free it.
LEAVE = """
if redis.call('GET', KEYS[1]) == ARGV[3] and redis.call('HGET', KEYS[2], ARGV[2]) == ARGV[1] then
  redis.call('HDEL', KEYS[2], ARGV[2])
  if redis.call('HLEN', KEYS[2]) == 1 then redis.call('DEL', KEYS[2]) end
end
if redis.call('GET', KEYS[3]) == ARGV[1] then redis.call('DEL', KEYS[3]) end
return redis.call('DEL', KEYS[1])
"""

# KEYS: NS:slots, NS:sweeper. ARGV: NS, incarnation, lease (ms).
# Answers [generation, slot, its incarnation, ...] of slots that nobody writes any more; [] if there are none, or if
# another worker is the one that looks: that takes longer the more workers there are, and all of them would.
BEGIN_SWEEP = f"""
local sweeper = redis.call('GET', KEYS[2])
if sweeper and sweeper ~= ARGV[2] then return {{}} end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
local answer, slots = {{}}, redis.call('HGETALL', KEYS[1])
for i = 1, #slots, 2 do
  if slots[i] == 'generation' then
    answer[1] = slots[i + 1]
  end
end
for i = 1, #slots, 2 do
  if slots[i] ~= 'generation' then
    local owner = redis.call('GET', ARGV[1] .. ':index:' .. slots[i + 1])
    local mine = answer[1] .. ':' .. slots[i] .. ':'
    if (not owner or string.sub(owner, 1, #mine) ~= mine) and #answer < {2 * SWEEP_SLOTS} then
      answer[#answer + 1] = slots[i]
      answer[#answer + 1] = slots[i + 1]
    end
  end
end
return #answer < 2 and {{}} or answer
"""

# KEYS: NS:slots, NS:sweeper. ARGV: NS, incarnation of the sweeper, lease (ms), first bucket, then `BEGIN_SWEEP`'s
# answer. Takes the slots out of some buckets; behind the last one they are free.
# Answers the next bucket, or -1: another sweeper has taken over.
SWEEP = f"""{_LOCATE}
local generation = ARGV[5]
if redis.call('GET', KEYS[2]) ~= ARGV[2] or redis.call('HGET', KEYS[1], 'generation') ~= generation then return -1 end
local gone, alone = {{}}, {{}}
for i = 6, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) ~= ARGV[i + 1] then return -1 end
  local slot = tonumber(ARGV[i])
  gone[#gone + 1], alone[string.char(math.floor(slot / 256), slot % 256)] = slot, true
end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
local buckets = ARGV[1] .. ':pages:' .. generation .. ':'
local at, seen = tonumber(ARGV[4]), 0
local last = math.min(at + {SWEEP_BUCKETS}, {1 << BUCKET_BITS})
while at < last and seen < {SWEEP_ENTRIES} do
  local key = buckets .. string.char(math.floor(at / 65536), math.floor(at / 256) % 256, at % 256)
  local entries = redis.call('HGETALL', key)
  for i = 1, #entries, 2 do
    local rest = entries[i + 1]
    if alone[rest] then
      rest = ''
    elseif #rest > 2 then
      for _, slot in ipairs(gone) do
        local where, there = locate(rest, slot)
        if there then rest = string.sub(rest, 1, where - 1) .. string.sub(rest, where + 2) end
      end
    end
    if rest == '' then
      redis.call('HDEL', key, entries[i])
    elseif rest ~= entries[i + 1] then
      redis.call('HSET', key, entries[i], rest)
    end
  end
  at, seen = at + 1, seen + #entries / 2
end
if at == {1 << BUCKET_BITS} then
  for _, slot in ipairs(gone) do redis.call('HDEL', KEYS[1], slot) end
  redis.call('DEL', KEYS[2])
end
return at
"""
