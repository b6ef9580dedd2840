"""The Triton kernels of `sample`: filters and a draw for each row of logits, without sorting a row.

1. `stream_kernel`, (rows, splits): the one pass over all logits. A greedy row leaves each split's largest logit, a row
   that draws from everything its largest logit plus Gumbel noise, a row with filters its maximum only.
2. `count_kernel`, (rows, splits): rows with filters count tokens by distance from the maximum, in bins of 1/8.
3. `gather_kernel`, (rows, splits): the counts bound where top-k and top-p cut. Tokens of those bins, or of all bins
   above too where they are few, go into a list; exact probability mass above them is summed.
4. `finish_kernel`, (rows,): joins the splits. Rows with filters find the cut exactly by bisection over the list, then
   draw from the list, or from the whole row where the tokens kept are too many for a list.

Probability masses are integers, multiples of 2^-40 of the likeliest token's: sums do not depend on their order, so that
a row's result depends neither on the batch nor on how it was split. Logits are compared by integer keys in the same
order. Every kernel leaves at once for rows that do not need it. Called by kernels/sample.py, which says what the
arguments are; philox is tl.philox with the counters of kernels/philox.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.sample_row import (
    GREEDY_BELOW,
    LOGIT_BINS,
    MASS_ONE,
    MIN_TEMPERATURE,
    NEVER,
    NUM_BINS,
    ROUNDING,
    SLACK,
    best_of,
    bin_of,
    has_filter,
    mass_of,
    min_p_floor,
    row_logits,
    row_maximum,
    score_bound,
    score_of,
    tile_bits,
)


@triton.jit(do_not_specialize=["tiles"])
def stream_kernel(
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
    listed_ptr,
    vocab,
    tiles,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Best (value, id) of each split; clears what the row's next kernels count in. `tiles`: of a split."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logits = logits_ptr + row.to(tl.int64) * logits_stride
    first = split * tiles * TILE
    last = tl.minimum(first + tiles * TILE, vocab)
    # Each tile is loaded while the one before is looked at, the first while the row's parameters are read.
    raw = tl.load(logits + first + tl.arange(0, TILE), mask=first + tl.arange(0, TILE) < last, other=NEVER)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    position = tl.load(positions_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    uses_tokens = tl.load(uses_tokens_ptr + slot)
    banned = position < tl.load(min_position_ptr + slot)
    repetition = tl.load(repetition_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    top_k, top_p, min_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)
    filtered = has_filter(temperature, top_k, top_p, min_p, vocab)
    state = state_ptr + slot * state_stride
    bias = bias_ptr + slot * state_stride
    best = tl.full([TILE], NEVER, tl.float32)
    best_id = first + tl.arange(0, TILE)
    if filtered | (temperature < GREEDY_BELOW):
        for start in range(first, last, TILE):
            ids = start + tl.arange(0, TILE)
            following = tl.load(logits + TILE + ids, mask=TILE + ids < last, other=NEVER)
            x = row_logits(raw, state, bias, ids, ids < vocab, uses_tokens, banned, repetition, frequency, presence)
            raw = following
            better = x > best
            best = tl.where(better, x, best)
            best_id = tl.where(better, ids, best_id)
    else:
        scale = tl.maximum(temperature, MIN_TEMPERATURE)
        inverse = 1.0 / scale
        seed = tl.load(seeds_ptr + slot)
        reached = tl.full([], NEVER, tl.float32)
        for start in range(first, last, TILE):
            ids = start + tl.arange(0, TILE)
            following = tl.load(logits + TILE + ids, mask=TILE + ids < last, other=NEVER)
            x = row_logits(raw, state, bias, ids, ids < vocab, uses_tokens, banned, repetition, frequency, presence)
            raw = following
            bits = tile_bits(seed, position, start, TILE)
            # The further the pass, the rarer a tile that holds a better token: logarithms for those only.
            if tl.max(score_bound(x * inverse, bits)) > reached:
                score = score_of(tl.div_rn(x, scale), bits)
                better = score > best
                best = tl.where(better, score, best)
                best_id = tl.where(better, ids, best_id)
                reached = tl.max(best)
    largest, token = best_of(best, best_id)
    tl.store(best_ptr + row * SPLITS + split, largest)
    tl.store(best_id_ptr + row * SPLITS + split, token)
    if filtered & (split == 0):
        tl.store(counts_ptr + row * NUM_BINS + tl.arange(0, NUM_BINS), tl.zeros([NUM_BINS], tl.int32))
        tl.store(listed_ptr + row, 0)


@triton.jit(do_not_specialize=["splits", "tiles"])
def count_kernel(
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
    min_position_ptr,
    uses_tokens_ptr,
    state_ptr,
    bias_ptr,
    state_stride,
    best_ptr,
    counts_ptr,
    total_ptr,
    vocab,
    splits,
    tiles,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tokens of each bin that min-p leaves, added to the row's counts; and each split's probability mass."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    temperature = tl.load(temperature_ptr + slot)
    top_k, top_p, min_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)
    if has_filter(temperature, top_k, top_p, min_p, vocab) == 0:
        return
    scale = tl.maximum(temperature, MIN_TEMPERATURE)
    maximum = row_maximum(best_ptr, row, splits, scale, SPLITS)
    if maximum == NEVER:
        return
    floor = min_p_floor(maximum, min_p)
    uses_tokens = tl.load(uses_tokens_ptr + slot)
    banned = tl.load(positions_ptr + row) < tl.load(min_position_ptr + slot)
    repetition = tl.load(repetition_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    logits = logits_ptr + row.to(tl.int64) * logits_stride
    state = state_ptr + slot * state_stride
    bias = bias_ptr + slot * state_stride

    counts = tl.zeros([NUM_BINS], tl.int32)
    mass = tl.zeros([TILE], tl.int64)
    first = split * tiles * TILE
    last = tl.minimum(first + tiles * TILE, vocab)
    for start in range(first, last, TILE):
        ids = start + tl.arange(0, TILE)
        raw = tl.load(logits + ids, mask=ids < last, other=NEVER)
        x = row_logits(raw, state, bias, ids, ids < vocab, uses_tokens, banned, repetition, frequency, presence)
        z = tl.div_rn(x, scale)
        alive = (z >= floor) & (z > NEVER)
        counts += tl.histogram(bin_of(z, maximum, scale), NUM_BINS, mask=alive)
        mass += tl.where(alive, mass_of(z, maximum), 0)
    bins = tl.arange(0, NUM_BINS)
    tl.atomic_add(counts_ptr + row * NUM_BINS + bins, counts, mask=counts > 0)
    tl.store(total_ptr + row * SPLITS + split, tl.sum(mass))


@triton.jit
def _cut_bins(counts_ptr, row, total, scale, top_k, top_p, vocab, CAPACITY: tl.constexpr):
    """(first, last) bin of the list, how many tokens are above it: what is cut off is cut within these bins.

    `total` is the probability mass that min-p leaves. Counts are exact, so that top-k's bin is; masses lie between the
    counts times the weights of the bins' two ends. Without top-k, what lies above a bin is bounded from the total less
    what lies below too. Without top-k and top-p nothing is cut, and the list may be empty.
    """
    bins = tl.arange(0, NUM_BINS)
    counts = tl.load(counts_ptr + row * NUM_BINS + bins)
    up_to = tl.cumsum(counts, 0)
    by_k = (top_k > 0) & (top_k < vocab)
    by_p = top_p < 1.0
    k_bin = tl.where(by_k, tl.minimum(tl.sum((up_to < top_k).to(tl.int32)), NUM_BINS - 1), NUM_BINS - 1)
    width = 1.0 / (scale * LOGIT_BINS)  # in nats
    most = counts.to(tl.float32) * tl.exp(-width * bins.to(tl.float32)) * (1.0 + SLACK)
    least = tl.where(bins == NUM_BINS - 1, 0.0, most * (tl.exp(-width) * (1.0 - 2.0 * SLACK)))
    reached_most, reached_least = tl.cumsum(most, 0), tl.cumsum(least, 0)
    if by_k:
        whole_most = tl.sum(tl.where(bins <= k_bin, most, 0.0))
        whole_least = tl.sum(tl.where(bins < k_bin, least, 0.0))
    else:
        known = total.to(tl.float32) / MASS_ONE
        whole_most = known * (1.0 + ROUNDING)
        whole_least = known * (1.0 - ROUNDING)
        reached_most = tl.minimum(reached_most, whole_most - (tl.cumsum(least, 0, reverse=True) - least))
        reached_least = tl.maximum(reached_least, whole_least - (tl.cumsum(most, 0, reverse=True) - most))
    p_first = tl.sum((reached_most < top_p * whole_least).to(tl.int32))
    p_last = tl.sum((reached_least < top_p * whole_most).to(tl.int32))
    last = tl.where(by_p & (by_k == 0), tl.minimum(p_last, k_bin), k_bin)
    first = tl.where(by_p, tl.minimum(p_first, last), tl.where(by_k, k_bin, NUM_BINS))
    few = tl.sum(tl.where(bins <= last, counts, 0)) <= CAPACITY
    first = tl.where(few, 0, first)
    return first, last, tl.sum(tl.where(bins < first, counts, 0))


@triton.jit(do_not_specialize=["splits", "tiles"])
def gather_kernel(
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
    min_position_ptr,
    uses_tokens_ptr,
    state_ptr,
    bias_ptr,
    state_stride,
    best_ptr,
    counts_ptr,
    total_ptr,
    above_ptr,
    num_above_ptr,
    listed_ptr,
    list_z_ptr,
    list_id_ptr,
    vocab,
    splits,
    tiles,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Lists the tokens of the bins where the row is cut, in any order; sums the mass above them. More tokens than the
    list holds are counted and dropped: `listed` above CAPACITY says so."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    temperature = tl.load(temperature_ptr + slot)
    top_k, top_p, min_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)
    if has_filter(temperature, top_k, top_p, min_p, vocab) == 0:
        return
    scale = tl.maximum(temperature, MIN_TEMPERATURE)
    maximum = row_maximum(best_ptr, row, splits, scale, SPLITS)
    if maximum == NEVER:
        return
    floor = min_p_floor(maximum, min_p)
    lanes = tl.arange(0, SPLITS)
    total = tl.sum(tl.load(total_ptr + row * SPLITS + lanes, mask=lanes < splits, other=0))
    first_bin, last_bin, num_above = _cut_bins(counts_ptr, row, total, scale, top_k, top_p, vocab, CAPACITY)
    if split == 0:
        tl.store(num_above_ptr + row, num_above)
    uses_tokens = tl.load(uses_tokens_ptr + slot)
    banned = tl.load(positions_ptr + row) < tl.load(min_position_ptr + slot)
    repetition = tl.load(repetition_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    logits = logits_ptr + row.to(tl.int64) * logits_stride
    state = state_ptr + slot * state_stride
    bias = bias_ptr + slot * state_stride
    list_at = row.to(tl.int64) * CAPACITY

    mass = tl.zeros([TILE], tl.int64)
    first = split * tiles * TILE
    last = tl.minimum(first + tiles * TILE, vocab)
    for start in range(first, last, TILE):
        ids = start + tl.arange(0, TILE)
        raw = tl.load(logits + ids, mask=ids < last, other=NEVER)
        x = row_logits(raw, state, bias, ids, ids < vocab, uses_tokens, banned, repetition, frequency, presence)
        z = tl.div_rn(x, scale)
        alive = (z >= floor) & (z > NEVER)
        bins = bin_of(z, maximum, scale)
        if num_above > 0:
            mass += tl.where(alive & (bins < first_bin), mass_of(z, maximum), 0)
        chosen = alive & (bins >= first_bin) & (bins <= last_bin)
        ones = chosen.to(tl.int32)
        number = tl.sum(ones)
        if number > 0:
            place = tl.atomic_add(listed_ptr + row, number) + tl.cumsum(ones, 0) - 1
            chosen = chosen & (place < CAPACITY)
            tl.store(list_z_ptr + list_at + place, z, mask=chosen)
            tl.store(list_id_ptr + list_at + place, ids, mask=chosen)
    tl.store(above_ptr + row * SPLITS + split, tl.sum(mass))
