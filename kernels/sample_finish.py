"""The last kernel of `sample`: joins the splits of a row, finds where its filters cut, draws, counts the token.

One program a row. `sample_kernels.gather_kernel` left a list that holds every token at which top-k or top-p can cut,
and the number and mass of tokens above it. A cut is an interval of keys and an id: tokens above the interval stay,
tokens in it stay up to the id. The interval is narrowed by bisection until one token, or tokens of one value, are in
it; which of equal tokens stay is decided by id, as kernels/filters.py does. A row whose list was too small is searched
itself: right, but a pass over the logits for each step of the bisection.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.sample_row import (
    MIN_TEMPERATURE,
    NEVER,
    NO_ID,
    NUM_BINS,
    best_of,
    has_filter,
    id_bits,
    mass_of,
    min_p_floor,
    order_key,
    row_logits,
    row_maximum,
    score_bound,
    score_of,
    tile_bits,
)

_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def _tokens(
    start,
    size,
    listed,
    list_z,
    list_id,
    logits,
    state,
    uses_tokens,
    banned,
    repetition,
    frequency,
    presence,
    scale,
    floor,
    TILE: tl.constexpr,
):
    """(z, ids) of one tile of the list, or of the row; -inf where there is no token or min-p drops it."""
    lanes = start + tl.arange(0, TILE)
    if listed:
        z = tl.load(list_z + lanes, mask=lanes < size, other=NEVER)
        ids = tl.load(list_id + lanes, mask=lanes < size, other=0)
    else:
        raw = tl.load(logits + lanes, mask=lanes < size, other=NEVER)
        x = row_logits(raw, state, lanes, lanes < size, uses_tokens, banned, repetition, frequency, presence)
        z = tl.div_rn(x, scale)
        z = tl.where(z >= floor, z, NEVER)
        ids = lanes
    return z, ids


@triton.jit
def _stays(key, ids, low, high, last_id):
    """Whether a cut leaves tokens."""
    return (key > high) | ((key >= low) & (ids <= last_id))


@triton.jit
def _whole():
    """A cut that leaves everything."""
    lowest = tl.full([], _LOWEST, tl.int32)
    return lowest, lowest, tl.full([], NO_ID, tl.int32)


@triton.jit
def finish_kernel(
    logits_ptr,
    logits_stride,
    slots_ptr,
    positions_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    seeds_ptr,
    min_position_ptr,
    uses_tokens_ptr,
    state_ptr,
    state_stride,
    best_ptr,
    best_id_ptr,
    counts_ptr,
    total_ptr,
    above_ptr,
    num_above_ptr,
    listed_ptr,
    list_z_ptr,
    list_id_ptr,
    tokens_ptr,
    vocab,
    splits,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    FILTERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """tokens[row] = the row's token; the token is counted in `state` where the slot asks for it."""
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        tl.store(tokens_ptr + row, 0)
        return
    uses_tokens = tl.load(uses_tokens_ptr + slot)
    state = state_ptr + slot * state_stride
    lanes = tl.arange(0, SPLITS)
    value = tl.load(best_ptr + row * SPLITS + lanes, mask=lanes < splits, other=NEVER)
    _, token = best_of(value, tl.load(best_id_ptr + row * SPLITS + lanes, mask=lanes < splits, other=NO_ID))

    if FILTERS:
        temperature = tl.load(temperature_ptr + slot)
        top_k, top_p, min_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)
        scale = tl.maximum(temperature, MIN_TEMPERATURE)
        maximum = row_maximum(best_ptr, row, splits, scale, SPLITS)
        if has_filter(temperature, top_k, top_p, min_p, vocab) & (maximum > NEVER):
            position = tl.load(positions_ptr + row)
            seed = tl.load(seeds_ptr + slot)
            banned = position < tl.load(min_position_ptr + slot)
            repetition = tl.load(repetition_ptr + slot)
            frequency = tl.load(frequency_ptr + slot)
            presence = tl.load(presence_ptr + slot)
            logits = logits_ptr + row.to(tl.int64) * logits_stride
            floor = min_p_floor(maximum, min_p)
            alive = tl.sum(tl.load(counts_ptr + row * NUM_BINS + tl.arange(0, NUM_BINS)))
            total = tl.sum(tl.load(total_ptr + row * SPLITS + lanes, mask=lanes < splits, other=0))
            number = tl.load(listed_ptr + row)
            listed = number <= CAPACITY
            list_z = list_z_ptr + row.to(tl.int64) * CAPACITY
            list_id = list_id_ptr + row.to(tl.int64) * CAPACITY
            size = tl.where(listed, number, vocab)
            num_above = tl.where(listed, tl.load(num_above_ptr + row), 0).to(tl.int64)
            above = tl.sum(tl.load(above_ptr + row * SPLITS + lanes, mask=lanes < splits, other=0))
            above = tl.where(listed, above, 0)

            # The cuts: of top-k, then of top-p among what top-k leaves. At first nothing is cut.
            k_low, k_high, k_id = _whole()
            p_low, p_high, p_id = _whole()
            for by_mass in range(2):
                wanted = tl.where(by_mass != 0, top_p < 1.0, (top_k > 0) & (top_k < alive))
                if wanted:
                    # Amounts are tokens for top-k, mass for top-p. In each: of the tokens that stay so far.
                    base = tl.where(by_mass != 0, above, num_above)
                    low = tl.full([], _HIGHEST, tl.int32)
                    high = tl.full([], _LOWEST, tl.int32)
                    up_to_low = base
                    many_low = num_above
                    for start in range(0, size, TILE):
                        z, ids = _tokens(
                            start, size, listed, list_z, list_id, logits, state, uses_tokens, banned,
                            repetition, frequency, presence, scale, floor, TILE,
                        )  # fmt: skip
                        key = order_key(z)
                        inside = (z > NEVER) & _stays(key, ids, k_low, k_high, k_id)
                        low = tl.minimum(low, tl.min(tl.where(inside, key, _HIGHEST)))
                        high = tl.maximum(high, tl.max(tl.where(inside, key, _LOWEST)))
                        ones = inside.to(tl.int64)
                        many_low += tl.sum(ones)
                        up_to_low += tl.sum(tl.where(by_mass != 0, tl.where(inside, mass_of(z, maximum), 0), ones))
                    whole = tl.where((top_k > 0) & (top_k < alive), up_to_low, total)
                    share = tl.ceil(top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
                    target = tl.where(by_mass != 0, tl.minimum(tl.maximum(share, 1), whole), top_k.to(tl.int64))

                    # The target is reached by the tokens from `low` up, not by those above `high`.
                    up_to_high = base
                    many_high = num_above
                    while (low < high) & (many_low - many_high > 1):
                        middle = ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
                        amount = base
                        many = num_above
                        for start in range(0, size, TILE):
                            z, ids = _tokens(
                                start, size, listed, list_z, list_id, logits, state, uses_tokens, banned,
                                repetition, frequency, presence, scale, floor, TILE,
                            )  # fmt: skip
                            key = order_key(z)
                            inside = (z > NEVER) & (key >= middle) & _stays(key, ids, k_low, k_high, k_id)
                            ones = inside.to(tl.int64)
                            many += tl.sum(ones)
                            amount += tl.sum(tl.where(by_mass != 0, tl.where(inside, mass_of(z, maximum), 0), ones))
                        if amount >= target:
                            low, up_to_low, many_low = middle, amount, many
                        else:
                            high, up_to_high, many_high = middle - 1, amount, many

                    # What is left in the interval is one token, or several of one value and so of one amount each.
                    equal = many_low - many_high
                    each = tl.maximum((up_to_low - up_to_high) // tl.maximum(equal, 1), 1)
                    needed = (target - up_to_high + each - 1) // each
                    last_id = vocab - 1
                    if needed < equal:
                        first_id = tl.full([], 0, tl.int32)
                        while first_id < last_id:
                            middle = (first_id + last_id) >> 1
                            many = tl.full([], 0, tl.int64)
                            for start in range(0, size, TILE):
                                z, ids = _tokens(
                                    start, size, listed, list_z, list_id, logits, state, uses_tokens, banned,
                                    repetition, frequency, presence, scale, floor, TILE,
                                )  # fmt: skip
                                key = order_key(z)
                                inside = (key >= low) & (key <= high) & _stays(key, ids, k_low, k_high, k_id)
                                many += tl.sum((inside & (z > NEVER) & (ids <= middle)).to(tl.int64))
                            if many >= needed:
                                last_id = middle
                            else:
                                first_id = middle + 1
                    if by_mass == 0:
                        k_low, k_high, k_id = low, high, last_id
                    else:
                        p_low, p_high, p_id = low, high, last_id

            best = tl.full([TILE], NEVER, tl.float32)
            best_id = tl.full([TILE], NO_ID, tl.int32)
            if listed & (num_above == 0):
                for start in range(0, size, TILE):
                    at = start + tl.arange(0, TILE)
                    z = tl.load(list_z + at, mask=at < size, other=NEVER)
                    ids = tl.load(list_id + at, mask=at < size, other=0)
                    key = order_key(z)
                    kept = _stays(key, ids, k_low, k_high, k_id) & _stays(key, ids, p_low, p_high, p_id)
                    score = tl.where(kept, score_of(z, id_bits(seed, position, ids)), NEVER)
                    better = (score > best) | ((score == best) & (ids < best_id))
                    best_id = tl.where(better & (at < size), ids, best_id)
                    best = tl.where(better, score, best)
            else:
                reached = tl.full([], NEVER, tl.float32)
                for start in range(0, vocab, TILE):
                    ids = start + tl.arange(0, TILE)
                    raw = tl.load(logits + ids, mask=ids < vocab, other=NEVER)
                    x = row_logits(raw, state, ids, ids < vocab, uses_tokens, banned, repetition, frequency, presence)
                    z = tl.div_rn(x, scale)
                    key = order_key(z)
                    kept = _stays(key, ids, k_low, k_high, k_id) & _stays(key, ids, p_low, p_high, p_id)
                    z = tl.where(kept & (z >= floor), z, NEVER)
                    bits = tile_bits(seed, position, start, TILE)
                    if tl.max(score_bound(z, bits)) > reached:
                        score = score_of(z, bits)
                        better = score > best
                        best = tl.where(better, score, best)
                        best_id = tl.where(better, ids, best_id)
                        reached = tl.max(best)
            _, token = best_of(best, best_id)

    tl.store(tokens_ptr + row, token.to(tl.int64))
    if uses_tokens != 0:
        counter = state + token
        tl.store(counter, tl.load(counter) + 1)
