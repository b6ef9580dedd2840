"""Prefill attention in Triton, for any card, head size, page size and mask; see `prefill_attention` for the arguments.

Flash attention (Dao 2023) over pages. A program computes BLOCK_M rows of one key/value head, where a row is a pair (new
token, head of the group), so that a short chunk of grouped heads still fills the matrix units. It reads K and V page by
page; blocks of keys that every row sees are not masked. Where whole sequences give too few programs for the card, each
row's context is split over several programs and a second kernel joins their parts.

The launch depends on host bounds only (T, S, the largest query and context); lengths are read on the device, so one
CUDA graph serves every batch within the bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import INTERPRETED, num_multiprocessors, pdl_options
from penstock.kernels.prefill_splits import NOTHING, Parts, splits_for

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a launch."""

    rows: int  # (new token, head of the group) pairs of a program
    keys: int
    num_warps: int
    num_stages: int
    splits: int = 1  # programs that share a row's context


def choose_tiles(
    group: int,
    block_dim: int,
    itemsize: int,
    num_tokens: int,
    num_kv_heads: int,
    max_query_len: int,
    max_context: int,
    num_multiprocessors: int,
) -> Tiles:
    """Block sizes for a batch, from what the host knows of it."""
    longest = max_query_len * group
    if itemsize == 4:
        rows, keys, num_warps, num_stages = 32, 32, 4, 1
    elif block_dim > 128:
        rows, keys, num_warps, num_stages = (128, 64, 8, 2) if longest > 64 else (64, 64, 4, 2)
    elif longest > 64:
        rows, keys, num_warps, num_stages = 128, 128, 8, 3 if block_dim == 128 else 4
    elif longest > 16:
        rows, keys, num_warps, num_stages = 64, 64, 4, 3
    else:
        rows, keys, num_warps, num_stages = 16, 64, 4, 3
    programs = num_kv_heads * max(1, -(-num_tokens * group // rows))
    resident = num_multiprocessors * (1 if rows > 64 else 2)  # shared memory holds one large program, or two small
    return Tiles(rows, keys, num_warps, num_stages, splits_for(programs, resident, max_context, keys))


def prefill_attention_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_tables: Tensor,
    table_rows: Tensor,
    query_starts: Tensor,
    contexts: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    max_query_len: int,
    max_context: int,
    out: Tensor,
    tiles: Tiles | None = None,
) -> None:
    """`prefill_attention` in Triton; `tiles` overrides the rule."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1], k_pages.shape[2]
    num_sequences = table_rows.shape[0]
    if num_tokens == 0 or num_sequences == 0:
        return
    group = num_heads // num_kv_heads
    block_dim = max(16, triton.next_power_of_2(head_dim))
    if tiles is None:
        multiprocessors = num_multiprocessors(q.device)
        tiles = choose_tiles(
            group, block_dim, q.element_size(), num_tokens, num_kv_heads, max_query_len, max_context, multiprocessors
        )  # fmt: skip
    splits = tiles.splits
    parts = Parts.allocate(splits, q) if splits > 1 else None
    target = out if parts is None else parts.means
    _prefill_kernel[(num_kv_heads * splits, num_tokens * group // tiles.rows + num_sequences)](
        q,
        k_pages,
        v_pages,
        page_tables,
        table_rows,
        query_starts,
        contexts,
        sinks,
        target,
        None if parts is None else parts.masses,
        num_sequences,
        num_tokens,
        page_tables.stride(0),
        q.stride(0),
        q.stride(1),
        k_pages.stride(0),
        k_pages.stride(1),
        target.stride(-3),
        target.stride(-2),
        scale if soft_cap is not None else scale * LOG2_E,
        soft_cap or 0.0,
        sliding_window or 0,
        splits,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        NUM_HEADS=num_heads,
        MERGE=parts is not None,
        WINDOW=sliding_window is not None,
        SOFT_CAP=soft_cap is not None,
        SINKS=sinks is not None,
        IEEE=q.element_size() == 4 or INTERPRETED,  # the interpreter has no bfloat16 products
        BLOCK_S=max(128, triton.next_power_of_2(num_sequences)),
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.keys,
        BLOCK_D=block_dim,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **pdl_options(q),
    )
    if parts is not None:
        parts.join(sinks, query_starts, contexts, out)


@triton.jit
def _attend(
    acc,  # [BLOCK_M, BLOCK_D] float32
    total,  # [BLOCK_M] sum of weights
    top,  # [BLOCK_M] largest score, in powers of two
    q, k_base, v_base, table, begin, end, context,
    positions,  # [BLOCK_M] the last token that a row sees
    page_stride, scale, soft_cap, window, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, IEEE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Take the keys from begin (a multiple of BLOCK_N) to end into a block of rows' running softmax."""
    column = tl.arange(0, BLOCK_D)
    offset = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        token = start + offset
        if PAGE_SIZE % BLOCK_N == 0:
            page = tl.load(table + start // PAGE_SIZE).to(tl.int64) * page_stride + start % PAGE_SIZE * HEAD_DIM
            where = page + (offset[:, None] * HEAD_DIM + column[None, :])
        else:
            if MASKED:
                page = tl.load(table + token // PAGE_SIZE, mask=token < context, other=0)
            else:
                page = tl.load(table + token // PAGE_SIZE)
            row = page.to(tl.int64) * page_stride + token % PAGE_SIZE * HEAD_DIM
            where = row[:, None] + column[None, :]
        # Slots past the context hold anything, NaN too: a weight of zero would not silence them.
        if MASKED:
            valid = (token < context)[:, None] & (column < HEAD_DIM)[None, :]
            k = tl.load(k_base + where, mask=valid, other=0.0)
            v = tl.load(v_base + where, mask=valid, other=0.0)
        elif HEAD_DIM == BLOCK_D:
            k = tl.load(k_base + where)
            v = tl.load(v_base + where)
        else:
            k = tl.load(k_base + where, mask=(column < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(v_base + where, mask=(column < HEAD_DIM)[None, :], other=0.0)
        if IEEE:
            v = v.to(tl.float32)
            scores = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(k))
        if SOFT_CAP:  # tanh(x) = 1 - 2 / (1 + e^2x)
            turned = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (scale / soft_cap * (2 * 1.4426950408889634))))
            scores = turned * (soft_cap * 1.4426950408889634)
            factor = 1.0
        else:
            factor = scale
        if MASKED:
            seen = token[None, :] <= positions[:, None]
            if WINDOW:
                seen &= token[None, :] > positions[:, None] - window
            # Finite, so that a row that sees nothing yet has no NaN; its first real score takes all weight from it.
            # Scaled before: fused with the subtraction below, rounding would make it 2**(error of 1e30), 0 or infinite.
            scores = tl.where(seen, scores * factor, -1e30)
            factor = 1.0
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        if IEEE:
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc)
        top = new_top
    return acc, total, top


# What changes from step to step must not have a kernel of its own.
_VARYING = ["num_sequences", "num_tokens", "splits"]
_SLICES = ["table_rows_ptr", "query_starts_ptr", "contexts_ptr"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICES)
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, table_rows_ptr, query_starts_ptr, contexts_ptr, sinks_ptr,
    out_ptr,  # [T, heads, dim], or partial results [splits, T, heads, dim]
    masses_ptr,  # [splits, T, heads] log2 of a split's sum of weights
    num_sequences, num_tokens, table_stride, q_token_stride, q_head_stride, page_stride, kv_head_stride,
    out_token_stride, out_head_stride, scale, soft_cap, window, splits, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr, MERGE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, IEEE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    block = tl.program_id(1)

    # Sequence s has the blocks from starts[s] * GROUP // BLOCK_M + s on: room for all its rows, whatever they are.
    index = tl.arange(0, BLOCK_S)
    starts = tl.load(query_starts_ptr + index, mask=index < num_sequences, other=0) - tl.load(query_starts_ptr)
    firsts = starts * GROUP // BLOCK_M + index
    sequence = tl.sum(((firsts <= block) & (index < num_sequences)).to(tl.int32), 0) - 1
    first_token = tl.load(query_starts_ptr + sequence)
    num_queries = tl.load(query_starts_ptr + sequence + 1) - first_token
    # The last rows see most: they start first.
    first_block = tl.sum(tl.where(index == sequence, firsts, 0), 0)
    block = tl.cdiv(num_queries * GROUP, BLOCK_M) - 1 - (block - first_block)
    context = tl.load(contexts_ptr + sequence)
    if (block < 0) | (context == 0):
        return
    past = context - num_queries

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    own = rows < num_queries * GROUP
    queries = tl.minimum(rows // GROUP, num_queries - 1)
    tokens = (first_token + queries).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    column = tl.arange(0, BLOCK_D)
    inside = own[:, None] & (column < HEAD_DIM)[None, :]
    q_rows = tokens * q_token_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + column[None, :], mask=inside, other=0.0)
    if IEEE:
        q = q.to(tl.float32)

    # Keys from `begin` to `end` are seen by some row; from `full_begin` to `full_end`, by every row.
    low = past + block * BLOCK_M // GROUP
    high = past + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1)
    begin, end = 0, high + 1
    full_begin, full_end = 0, (low + 1) // BLOCK_N * BLOCK_N
    if WINDOW:
        begin = tl.maximum(low - window + 1, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(high - window + 1, 0), BLOCK_N) * BLOCK_N
    if MERGE:
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
        begin = begin + split * share
        end = tl.minimum(end, begin + share)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.minimum(full_end, end // BLOCK_N * BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    table = tables_ptr + tl.load(table_rows_ptr + sequence).to(tl.int64) * table_stride
    k_base = k_ptr + kv_head.to(tl.int64) * kv_head_stride
    v_base = v_ptr + kv_head.to(tl.int64) * kv_head_stride
    positions = past + queries
    if WINDOW:
        acc, total, top = _attend(
            acc, total, top, q, k_base, v_base, table, begin, tl.minimum(full_begin, end), context, positions,
            page_stride, scale, soft_cap, window, True, HEAD_DIM, PAGE_SIZE, WINDOW, SOFT_CAP, IEEE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, table, full_begin, full_end, context, positions,
        page_stride, scale, soft_cap, window, False, HEAD_DIM, PAGE_SIZE, WINDOW, SOFT_CAP, IEEE, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, table, tl.maximum(full_begin, full_end), end, context, positions,
        page_stride, scale, soft_cap, window, True, HEAD_DIM, PAGE_SIZE, WINDOW, SOFT_CAP, IEEE, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    out_rows = tokens * out_token_stride + heads * out_head_stride
    if MERGE:
        out_rows += split.to(tl.int64) * num_tokens * out_token_stride
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        mass = tl.where(empty, NOTHING, top + tl.log2(total))
        tl.store(masses_ptr + (split * num_tokens + tokens) * NUM_HEADS + heads, mass, mask=own)
    elif SINKS:
        sink = tl.load(sinks_ptr + heads).to(tl.float32) * 1.4426950408889634
        new_top = tl.maximum(top, sink)
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.exp2(sink - new_top)
        acc = acc * fade[:, None]
    acc = acc / total[:, None]
    tl.store(out_ptr + out_rows[:, None] + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
