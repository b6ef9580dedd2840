"""The last kernel of `sample`: joins the splits of a row, finds where its filters cut, draws, counts the token.

One program a row. `sample_kernels.gather_kernel` left a list that holds every token at which top-k or top-p can cut,
and the number and mass of tokens above it. A cut is a key and an id: tokens of larger keys stay, and tokens of that key
up to the id, so that which of equal tokens stay is decided by id, as kernels/filters.py does. Both are found by
bisection. A row whose list was too small is searched itself: right, but a pass over the logits for each step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.sample_row import (
    MIN_TEMPERATURE,
    NEVER,
    NO_ID,
    NUM_BINS,
    RECENT_INTS,
    TABLE_INTS,
    TRACKS_BANS,
    ban_next,
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
    bias,
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
        x = row_logits(raw, state, bias, lanes, lanes < size, uses_tokens, banned, repetition, frequency, presence)
        z = tl.div_rn(x, scale)
        z = tl.where(z >= floor, z, NEVER)
        ids = lanes
    return z, ids


@triton.jit
def _stays(key, ids, cut, last_id):
    """Whether a cut leaves tokens."""
    return (key > cut) | ((key == cut) & (ids <= last_id))


@triton.jit
def _amount(inside, z, maximum, by_mass):
    """int64: what each token counts for, its mass or 1."""
    return tl.where(inside, tl.where(by_mass != 0, mass_of(z, maximum), 1), 0).to(tl.int64)


@triton.jit(do_not_specialize=["splits"])
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
    bias_ptr,
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
    turn_ptr,
    turn_stride,
    last_ptr,
    ban_length_ptr,
    ban_words_ptr,
    recent_ptr,
    vocab,
    splits,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    IN_TURN: tl.constexpr,
    PDL: tl.constexpr,
):
    """tokens[turn, row] = last[slot] = the row's token; it is counted in `state` where the slot asks for it."""
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if IN_TURN:
        tokens_ptr += tl.load(turn_ptr) * turn_stride
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        tl.store(tokens_ptr + row, 0)
        return
    uses_tokens = tl.load(uses_tokens_ptr + slot)
    state = state_ptr + slot * state_stride
    bias = bias_ptr + slot * state_stride
    lanes = tl.arange(0, SPLITS)
    value = tl.load(best_ptr + row * SPLITS + lanes, mask=lanes < splits, other=NEVER)
    _, token = best_of(value, tl.load(best_id_ptr + row * SPLITS + lanes, mask=lanes < splits, other=NO_ID))

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
        k_cut = tl.full([], _LOWEST, tl.int32)
        k_id = tl.full([], NO_ID, tl.int32)
        p_cut, p_id = k_cut, k_id
        for by_mass in range(2):
            wanted = tl.where(by_mass != 0, top_p < 1.0, (top_k > 0) & (top_k < alive))
            if wanted:
                # Amounts are tokens for top-k, mass for top-p. In each: of the tokens that stay so far.
                base = tl.where(by_mass != 0, above, num_above)
                low = tl.full([], _HIGHEST, tl.int32)
                high = tl.full([], _LOWEST, tl.int32)
                up_to_low = base
                for start in range(0, size, TILE):
                    z, ids = _tokens(
                        start, size, listed, list_z, list_id, logits, state, bias, uses_tokens, banned,
                        repetition, frequency, presence, scale, floor, TILE,
                    )  # fmt: skip
                    key = order_key(z)
                    inside = (z > NEVER) & _stays(key, ids, k_cut, k_id)
                    low = tl.minimum(low, tl.min(tl.where(inside, key, _HIGHEST)))
                    high = tl.maximum(high, tl.max(tl.where(inside, key, _LOWEST)))
                    up_to_low += tl.sum(_amount(inside, z, maximum, by_mass))
                whole = tl.where((top_k > 0) & (top_k < alive), up_to_low, total)
                share = tl.ceil(top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
                target = tl.where(by_mass != 0, tl.minimum(tl.maximum(share, 1), whole), top_k.to(tl.int64))

                # The target is reached by the tokens from `low` up, not by those above `high`; both are keys of
                # tokens, so that few values are few steps.
                up_to_high = base
                while low < high:
                    middle = ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
                    amount = base
                    upper_low = tl.full([], _HIGHEST, tl.int32)
                    lower_high = tl.full([], _LOWEST, tl.int32)
                    for start in range(0, size, TILE):
                        z, ids = _tokens(
                            start, size, listed, list_z, list_id, logits, state, bias, uses_tokens, banned,
                            repetition, frequency, presence, scale, floor, TILE,
                        )  # fmt: skip
                        key = order_key(z)
                        inside = (z > NEVER) & _stays(key, ids, k_cut, k_id)
                        upper = inside & (key >= middle)
                        lower = inside & (key < middle)
                        upper_low = tl.minimum(upper_low, tl.min(tl.where(upper, key, _HIGHEST)))
                        lower_high = tl.maximum(lower_high, tl.max(tl.where(lower, key, _LOWEST)))
                        amount += tl.sum(_amount(upper, z, maximum, by_mass))
                    if amount >= target:
                        low, up_to_low = upper_low, amount
                    else:
                        high, up_to_high = lower_high, amount

                # The tokens of that value, which have one amount each; of them the first ids as far as needed.
                equal = tl.full([], 0, tl.int64)
                first_id = tl.full([], NO_ID, tl.int32)
                last_id = tl.full([], 0, tl.int32)
                for start in range(0, size, TILE):
                    z, ids = _tokens(
                        start, size, listed, list_z, list_id, logits, state, bias, uses_tokens, banned,
                        repetition, frequency, presence, scale, floor, TILE,
                    )  # fmt: skip
                    key = order_key(z)
                    inside = (z > NEVER) & (key == low) & _stays(key, ids, k_cut, k_id)
                    equal += tl.sum(inside.to(tl.int64))
                    first_id = tl.minimum(first_id, tl.min(tl.where(inside, ids, NO_ID)))
                    last_id = tl.maximum(last_id, tl.max(tl.where(inside, ids, 0)))
                each = tl.maximum((up_to_low - up_to_high) // tl.maximum(equal, 1), 1)
                needed = (target - up_to_high + each - 1) // each
                while (needed < equal) & (first_id < last_id):
                    middle = (first_id + last_id) >> 1
                    many = tl.full([], 0, tl.int64)
                    upper_first = tl.full([], NO_ID, tl.int32)
                    lower_last = tl.full([], 0, tl.int32)
                    for start in range(0, size, TILE):
                        z, ids = _tokens(
                            start, size, listed, list_z, list_id, logits, state, bias, uses_tokens, banned,
                            repetition, frequency, presence, scale, floor, TILE,
                        )  # fmt: skip
                        key = order_key(z)
                        inside = (z > NEVER) & (key == low) & _stays(key, ids, k_cut, k_id)
                        lower = inside & (ids <= middle)
                        many += tl.sum(lower.to(tl.int64))
                        lower_last = tl.maximum(lower_last, tl.max(tl.where(lower, ids, 0)))
                        upper_first = tl.minimum(upper_first, tl.min(tl.where(inside & (ids > middle), ids, NO_ID)))
                    if many >= needed:
                        last_id = lower_last
                    else:
                        first_id = upper_first
                if by_mass == 0:
                    k_cut, k_id = low, last_id
                else:
                    p_cut, p_id = low, last_id

        best = tl.full([TILE], NEVER, tl.float32)
        best_id = tl.full([TILE], NO_ID, tl.int32)
        if listed & (num_above == 0):
            for start in range(0, size, TILE):
                at = start + tl.arange(0, TILE)
                z = tl.load(list_z + at, mask=at < size, other=NEVER)
                ids = tl.load(list_id + at, mask=at < size, other=0)
                key = order_key(z)
                kept = _stays(key, ids, k_cut, k_id) & _stays(key, ids, p_cut, p_id)
                score = tl.where(kept, score_of(z, id_bits(seed, position, ids)), NEVER)
                better = (score > best) | ((score == best) & (ids < best_id))
                best_id = tl.where(better & (at < size), ids, best_id)
                best = tl.where(better, score, best)
        else:
            reached = tl.full([], NEVER, tl.float32)
            for start in range(0, vocab, TILE):
                ids = start + tl.arange(0, TILE)
                raw = tl.load(logits + ids, mask=ids < vocab, other=NEVER)
                x = row_logits(raw, state, bias, ids, ids < vocab, uses_tokens, banned, repetition, frequency, presence)
                z = tl.div_rn(x, scale)
                key = order_key(z)
                kept = _stays(key, ids, k_cut, k_id) & _stays(key, ids, p_cut, p_id)
                z = tl.where(kept & (z >= floor), z, NEVER)
                bits = tile_bits(seed, position, start, TILE)
                if tl.max(score_bound(z, bits)) > reached:
                    score = score_of(z, bits)
                    better = score > best
                    best = tl.where(better, score, best)
                    best_id = tl.where(better, ids, best_id)
                    reached = tl.max(best)
        # Nothing drawn: no logit is a finite number. The splits' token is a token all the same.
        score, drawn = best_of(best, best_id)
        token = tl.where(score > NEVER, drawn, token)

    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(last_ptr + slot, token)
    if uses_tokens != 0:
        counter = state + token
        tl.store(counter, tl.load(counter) + 1)
        if (uses_tokens & TRACKS_BANS) != 0:
            words = ban_words_ptr + slot * TABLE_INTS
            recent = recent_ptr + slot * RECENT_INTS
            ban_next(state, words, recent, tl.load(ban_length_ptr + slot), tl.load(positions_ptr + row), token)
