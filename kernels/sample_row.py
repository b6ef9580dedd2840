"""Pieces of the sampling kernels that look at one row of logits: what its logits are, keys, masses, noise.

Constants and functions for kernels/sample_kernels.py and kernels/sample_finish.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNT_MASK = 2**28 - 1
BANNED = 2**28
IN_PROMPT = 2**29
ENDS = 2**30
MASKED = -(2**31)  # the sign: what the form of the output does not allow now

USES_STATE = 1  # what `uses_tokens` of a slot may hold, added up
USES_BIAS = 2
USES_BANS = 4
BAN_WORDS = 256  # words of several tokens that a slot may ban
BAN_LENGTH = 32  # tokens of such a word; a power of 2

BINS = 256
BINS_PER_LOGIT = 8  # the last bin holds everything from 32 below the maximum down

_COUNT_MASK = tl.constexpr(COUNT_MASK)
_SEEN_MASK = tl.constexpr(COUNT_MASK | IN_PROMPT)
_ENDS = tl.constexpr(ENDS)
_BANNED = tl.constexpr(BANNED)
_NOT_BANNED = tl.constexpr(~BANNED)
_USES_BIAS = tl.constexpr(USES_BIAS)
TRACKS_BANS = tl.constexpr(USES_BANS)
_BAN_WORDS = tl.constexpr(BAN_WORDS)
_BAN_LENGTH = tl.constexpr(BAN_LENGTH)
TABLE_INTS = tl.constexpr(BAN_LENGTH * BAN_WORDS)
RECENT_INTS = tl.constexpr(BAN_LENGTH)
NUM_BINS = tl.constexpr(BINS)
LOGIT_BINS = tl.constexpr(float(BINS_PER_LOGIT))
GREEDY_BELOW = tl.constexpr(1e-5)  # both as common/sampling.py
MIN_TEMPERATURE = tl.constexpr(0.01)
NEVER = tl.constexpr(float("-inf"))
NO_ID = tl.constexpr(2**31 - 1)
MASS_ONE = tl.constexpr(float(2**40))
SLACK = tl.constexpr(1e-3)  # of masses bounded by counts: far above rounding, far below a bin's width
ROUNDING = tl.constexpr(1e-5)  # of sums in float32, likewise


@triton.jit
def has_filter(temperature, top_k, top_p, min_p, vocab):
    cuts = ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0) | (min_p > 0.0)
    return cuts & (temperature >= GREEDY_BELOW)


@triton.jit
def row_logits(raw, state, bias, ids, valid, uses_tokens, banned, repetition, frequency, presence):
    """Raw logits of some ids of a row in float32, with bias, penalties and bans.

    `state`, `bias`: where the slot's rows of both begin; `banned`: tokens flagged ENDS are.
    """
    x = raw.to(tl.float32)
    if uses_tokens != 0:
        flags = tl.load(state + ids, mask=valid, other=0)
        if (uses_tokens & _USES_BIAS) != 0:
            x += tl.load(bias + ids, mask=valid, other=0.0)
        output = flags & _COUNT_MASK
        repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where((flags & _SEEN_MASK) != 0, repeated, x)
        x = tl.where(output > 0, x - (frequency * output.to(tl.float32) + presence), x)
        x = tl.where((banned & ((flags & _ENDS) != 0)) | ((flags & _BANNED) != 0) | (flags < 0), NEVER, x)
    return x


@triton.jit
def ban_next(state, words, recent, length, position, token):
    """Flags the tokens that would complete a banned word behind `token`, drawn for `position`; clears older flags.

    words: the slot's [BAN_LENGTH, BAN_WORDS]: each word's last token, the one before it, ...; -1 where a word has none.
    recent: the slot's [BAN_LENGTH]: the output token at position p lies at p % BAN_LENGTH. length: of the longest word.
    """
    lanes = tl.arange(0, _BAN_WORDS)
    last = tl.load(words + lanes)
    completes = last >= 0
    for back in range(1, length):
        wanted = tl.load(words + back * _BAN_WORDS + lanes)
        past = tl.load(recent + (position + 1 - back + _BAN_LENGTH) % _BAN_LENGTH)
        past = tl.where(back == 1, token, past)
        completes = completes & ((wanted < 0) | (wanted == past))
    tl.store(recent + position % _BAN_LENGTH, token)
    tl.debug_barrier()  # other threads may have changed the same tokens' entries just now
    tl.atomic_and(state + last, _NOT_BANNED, mask=last >= 0)
    tl.debug_barrier()  # of words that end alike, one may complete
    tl.atomic_or(state + last, _BANNED, mask=completes)


@triton.jit
def order_key(z):
    """int32 in the order of float32 z; both zeros are the same."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def mass_of(z, maximum):
    """int64: exp(z - maximum) in units of 2^-40."""
    return (tl.exp(z - maximum) * MASS_ONE).to(tl.int64)


@triton.jit
def tile_bits(seed, position, first, TILE: tl.constexpr):
    """Random words of the ids first .. first + TILE - 1 (first: a multiple of 4), purpose 0."""
    group = (first // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    none = tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox(seed, group, none + position.to(tl.uint32), none, none)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TILE])


@triton.jit
def id_bits(seed, position, ids):
    """Random words of any ids."""
    group = (ids // 4).to(tl.uint32)
    none = tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox(seed, group, none + position.to(tl.uint32), none, none)
    word = ids % 4
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def score_of(z, bits):
    """z - log(noise), noise = -log(1 - u) of the uniform u in the random word, accurate for small u too (Kahan)."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    rest = 1.0 - u
    away = tl.where(rest == 1.0, 1.0, rest - 1.0)
    noise = tl.where(rest == 1.0, u, u * (tl.log(rest) / away))
    return z - tl.log(noise)


@triton.jit
def score_bound(z, bits):
    """At least `score_of` for z within a few roundings, by 0.06 at most, without a logarithm.

    Noise is at least u, and a float's exponent with its mantissa as the fraction is at most its logarithm to base 2.
    """
    z = tl.maximum(z, -1e30)
    uniform = bits.to(tl.float32) + 0.5  # times 2^32
    log2 = uniform.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07 - 159.0
    return z + tl.abs(z) * 1e-6 + 1e-3 - 0.6931471805599453 * log2


@triton.jit
def best_of(value, ids):
    """(largest value, its lowest id) of a block."""
    largest = tl.max(value)
    return largest, tl.min(tl.where(value == largest, ids, NO_ID))


@triton.jit
def row_maximum(best_ptr, row, splits, scale, SPLITS: tl.constexpr):
    """The row's largest logit divided by the temperature: division keeps the order."""
    lanes = tl.arange(0, SPLITS)
    return tl.div_rn(tl.max(tl.load(best_ptr + row * SPLITS + lanes, mask=lanes < splits, other=NEVER)), scale)


@triton.jit
def min_p_floor(maximum, min_p):
    """What min-p leaves: z from here up."""
    return tl.where(min_p > 0.0, maximum + tl.log(tl.where(min_p > 0.0, min_p, 1.0)), NEVER)


@triton.jit
def bin_of(z, maximum, scale):
    """By distance from the row's maximum before the division by `scale`: any temperature fills as many bins."""
    return tl.minimum((maximum - z) * (scale * LOGIT_BINS), NUM_BINS - 1.0).to(tl.int32)
