"""Attention of one or a few new tokens a sequence over the paged cache: memory-bound, shared out evenly.

The heads of a group share one read of their keys and values, as rows of one small matrix product; so do the query
tokens of a sequence (several in speculative decoding). The tiles of all sequences of a step, whatever their lengths,
lie in one row, and each program takes as many of them as the others (as Stream-K does with a product's, Osama et al.
2023). Where a sequence is cut, its parts are merged (Milakov and Gimelshein 2018) by the program that ends last, which
saves a launch a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import num_multiprocessors, pdl_options

LOG2_E = 1.4426950408889634
_MERGED_NUMBERS = 128 * 32  # of parts' results that a warp has under way together: 128 registers of a thread
_MOST_MERGED = 16  # parts, where their results are small


class Tiles(NamedTuple):
    """How the keys are cut up."""

    tokens: int  # that a program takes in one go, a power of 2
    warps: int
    stages: int
    programs: int  # a multiprocessor: as many as are there at a time, so that none has to wait for another


def tiles_for(head_dim: int) -> Tiles:
    """Measured on an H200: two tiles of 32 KiB under way for each program, and three programs a multiprocessor.

    Of five stages the ids of pages take every other one: keys and values can be asked for only when they are known.
    """
    return Tiles(64 if head_dim <= 128 else 32, 2, 5, 3)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where the parts of a step's sequences meet; the same for all its layers. `arrived` is zero between launches."""

    tiles: Tiles
    resident: int  # programs of a key-value head that are there at a time
    arrived: Tensor  # int32 [B * num_kv_heads]
    partial: Tensor  # float32 [num_kv_heads * (resident + B), rows, head_dim]
    maxima: Tensor  # float32 [num_kv_heads * (resident + B), rows], of scores times log2(e)
    sums: Tensor  # the same

    @classmethod
    def allocate(
        cls,
        batch: int,
        rows: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
    ) -> DecodeWorkspace:
        """For `batch` sequences, `rows` query rows a key-value head (query tokens times group)."""
        tiles = tiles_for(head_dim)
        resident = max(1, tiles.programs * num_multiprocessors(device) // num_kv_heads)
        parts = num_kv_heads * (resident + batch)
        return cls(
            tiles,
            resident,
            torch.zeros(batch * num_kv_heads, dtype=torch.int32, device=device),
            torch.empty(parts, rows, head_dim, dtype=torch.float32, device=device),
            torch.empty(parts, rows, dtype=torch.float32, device=device),
            torch.empty(parts, rows, dtype=torch.float32, device=device),
        )


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_tables: Tensor,
    table_rows: Tensor,
    contexts: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    workspace: DecodeWorkspace,
    out: Tensor,
) -> None:
    """Causal attention of the last Q tokens of each of B sequences, into `out`; sequences of context 0 are skipped.

    Args:
        q: `[B * Q, num_heads, head_dim]`, sequence after sequence; `out` likewise, contiguous.
        k_pages, v_pages: `[num_pages, num_kv_heads, page_size, head_dim]`, one head's page contiguous, equal strides.
        page_tables: int32 `[N, W]`; `table_rows` int32 `[B]` names the row of each sequence.
        contexts: int32 `[B]`, tokens in the cache, the Q new ones included.
        sliding_window: a token sees itself and this many less one before it.
        soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2).
        sinks: float32 `[num_heads]`, a score that takes part in the denominator only (gpt-oss).
    """
    batch = contexts.shape[0]
    tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1], k_pages.shape[2]
    group = num_heads // num_kv_heads
    query_len = tokens // batch
    block_parts = triton.next_power_of_2(query_len * group)
    block_rows = max(16, block_parts)  # of a product
    block_dim = max(16, triton.next_power_of_2(head_dim))
    tiles = workspace.tiles
    # Few sequences are cut at their ends as well, which costs each of them a piece more, but no program two pieces.
    each = batch * 6 <= workspace.resident
    _decode_kernel[(num_kv_heads, workspace.resident + (batch if each else 0))](
        q,
        k_pages,
        v_pages,
        page_tables,
        table_rows,
        contexts,
        out,
        workspace.partial,
        workspace.maxima,
        workspace.sums,
        workspace.arrived,
        sinks,
        scale * LOG2_E,
        soft_cap or 0.0,
        sliding_window or 0,
        q.stride(0),
        q.stride(1),
        k_pages.stride(0),
        k_pages.stride(1),
        page_tables.stride(0),
        batch,
        workspace.resident,
        GROUP=group,
        QUERY_LEN=query_len,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        EACH=each,
        BLOCK_B=triton.next_power_of_2(batch),
        BLOCK_R=block_rows,
        BLOCK_P=block_parts,
        BLOCK_N=tiles.tokens,
        MERGED=max(1, min(_MOST_MERGED, _MERGED_NUMBERS * tiles.warps // (block_parts * block_dim))),
        BLOCK_D=block_dim,
        WINDOW=sliding_window is not None,
        SOFT_CAP=soft_cap is not None,
        SINKS=sinks is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **pdl_options(q),
    )


@triton.jit(do_not_specialize=["table_stride", "batch", "resident"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, rows_ptr, contexts_ptr, out_ptr, partial_ptr, maxima_ptr, sums_ptr, arrived_ptr,
    sinks_ptr,
    scale,  # times log2(e): exponentials are powers of two
    soft_cap, window, q_token_stride, q_head_stride, page_stride, head_stride, table_stride, batch,
    resident,  # programs of a head that are there at a time
    GROUP: tl.constexpr, QUERY_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    EACH: tl.constexpr,  # a program takes one piece; else what it comes to of the row
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, MERGED: tl.constexpr,
    BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1)
    # Lengths and page tables are as old as the step: they are read while the kernel ahead still runs (launch.py).
    index = tl.arange(0, BLOCK_B)
    contexts = tl.load(contexts_ptr + index, mask=index < batch, other=0)
    tiles = _tiles(contexts, _first_seen(contexts, window, QUERY_LEN, BLOCK_N, WINDOW), BLOCK_N)
    ends = tl.cumsum(tiles, 0)  # of the sequences, in the row of all tiles
    begins = ends - tiles
    total = tl.sum(tiles, 0)
    shares = resident
    if EACH:
        shares = tl.maximum(resident - tl.sum((tiles > 0).to(tl.int32), 0), 1)
    share = tl.maximum(tl.cdiv(total, shares), 1)
    # Along the row, from one piece to the next, either the share or the sequence is another: their sum numbers pieces.
    sequence = 0
    if EACH:
        sequence = tl.sum(((begins // share + index <= unit) & (index < batch)).to(tl.int32), 0) - 1
    low = (unit - sequence) * share
    high = tl.minimum(low + share, total)
    if EACH:
        low = tl.maximum(low, tl.sum(tl.where(index == sequence, begins, 0), 0))
        high = tl.minimum(high, tl.sum(tl.where(index == sequence, ends, 0), 0))
    if PDL:
        tl.extra.cuda.gdc_wait()  # in every program, or a kernel of padding only would end before the one ahead
        tl.extra.cuda.gdc_launch_dependents()
    if low >= high:
        return
    pointers = (q_ptr, k_ptr, v_ptr, tables_ptr, rows_ptr, contexts_ptr, out_ptr, sinks_ptr)
    parts = (partial_ptr, maxima_ptr, sums_ptr, arrived_ptr)
    strides = (q_token_stride, q_head_stride, page_stride, head_stride, table_stride)
    factors = (scale, soft_cap, window)
    if EACH:
        _attend(
            low, high, sequence, index, begins, ends, share, resident + batch, pointers, parts, strides, factors, GROUP,
            QUERY_LEN, HEAD_DIM, PAGE_SIZE, BLOCK_R, BLOCK_P, BLOCK_N, MERGED, BLOCK_D, WINDOW, SOFT_CAP, SINKS,
        )  # fmt: skip
    else:
        while low < high:
            sequence = tl.sum((ends <= low).to(tl.int32), 0)
            low = _attend(
                low, high, sequence, index, begins, ends, share, resident + batch, pointers, parts, strides, factors,
                GROUP, QUERY_LEN, HEAD_DIM, PAGE_SIZE, BLOCK_R, BLOCK_P, BLOCK_N, MERGED, BLOCK_D, WINDOW, SOFT_CAP,
                SINKS,
            )  # fmt: skip


@triton.jit
def _first_seen(contexts, window, QUERY_LEN: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Where the tiles of a sequence begin: at the first token that any of its query tokens sees, or a little before."""
    if WINDOW:
        return tl.maximum(contexts - QUERY_LEN + 1 - window, 0) // BLOCK_N * BLOCK_N
    return 0


@triton.jit
def _tiles(contexts, firsts, BLOCK_N: tl.constexpr):
    return tl.cdiv(contexts - firsts, BLOCK_N)


@triton.jit
def _attend(
    low, high,  # where in the row of tiles a program begins, and where it ends
    sequence,  # that low is in
    index, begins, ends, share, places, pointers, parts, strides, factors, GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, MERGED: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """A sequence's tiles from low on, up to high: its result, if these are all; or a part. Returns where it ended."""
    LOG2E: tl.constexpr = 1.4426950408889634
    ROWS: tl.constexpr = QUERY_LEN * GROUP
    q_ptr, k_ptr, v_ptr, tables_ptr, rows_ptr, contexts_ptr, out_ptr, sinks_ptr = pointers
    partial_ptr, maxima_ptr, sums_ptr, arrived_ptr = parts
    q_token_stride, q_head_stride, page_stride, head_stride, table_stride = strides
    scale, soft_cap, window = factors
    head, heads = tl.program_id(0), tl.num_programs(0)
    its_begin = tl.sum(tl.where(index == sequence, begins, 0), 0)
    its_end = tl.sum(tl.where(index == sequence, ends, 0), 0)
    until = tl.minimum(high, its_end)
    context = tl.load(contexts_ptr + sequence)
    first = _first_seen(context, window, QUERY_LEN, BLOCK_N, WINDOW)
    begin = first + (low - its_begin) * BLOCK_N
    end = tl.minimum(first + (until - its_begin) * BLOCK_N, context)
    table_ptr = tables_ptr + tl.load(rows_ptr + sequence).to(tl.int64) * table_stride
    k_ptr += head.to(tl.int64) * head_stride
    v_ptr += head.to(tl.int64) * head_stride

    row = tl.arange(0, BLOCK_R)
    token, member = row // GROUP, row % GROUP
    row_used = row < ROWS
    dim = tl.arange(0, BLOCK_D)
    dim_used = dim < HEAD_DIM
    q_tokens, q_heads = sequence * QUERY_LEN + token, head * GROUP + member
    q = tl.load(
        q_ptr + q_tokens[:, None] * q_token_stride + q_heads[:, None] * q_head_stride + dim[None, :],
        mask=row_used[:, None] & dim_used[None, :],
        other=0.0,
    )
    last_seen = context - QUERY_LEN + token  # position of the row's own token

    maximum = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        used = position < end
        page = tl.load(table_ptr + position // PAGE_SIZE, mask=used, other=0).to(tl.int64)
        offset = page * page_stride + (position % PAGE_SIZE) * HEAD_DIM
        k = tl.load(k_ptr + offset[None, :] + dim[:, None], mask=used[None, :] & dim_used[:, None], other=0.0)
        v = tl.load(v_ptr + offset[:, None] + dim[None, :], mask=used[:, None] & dim_used[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFT_CAP:
            bent = 2.0 * tl.sigmoid(2.0 * scores / (soft_cap * LOG2E)) - 1.0  # tanh
            scores = soft_cap * LOG2E * bent
        seen = used[None, :] & (position[None, :] <= last_seen[:, None])
        if WINDOW:
            seen = seen & (position[None, :] > last_seen[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # rows that have seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(maximum - base)
        mass = mass * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        maximum = highest

    if until - low == its_end - its_begin:
        _write(
            acc, mass, maximum, sinks_ptr, out_ptr, sequence, head, heads, GROUP, QUERY_LEN, HEAD_DIM, SINKS, BLOCK_R,
            BLOCK_D,
        )  # fmt: skip
    else:
        place = head * places + low // share + sequence
        flat = place * ROWS + row
        tl.store(maxima_ptr + flat, maximum, mask=row_used)
        tl.store(sums_ptr + flat, mass, mask=row_used)
        tl.store(partial_ptr + flat[:, None] * HEAD_DIM + dim[None, :], acc, mask=row_used[:, None] & dim_used[None, :])
        tl.debug_barrier()  # every thread's stores come before the one thread's release
        first_share = its_begin // share
        count = (its_end - 1) // share - first_share + 1
        counter = arrived_ptr + sequence * heads + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
            tl.store(counter, 0)  # for the next layer
            _merge(
                partial_ptr, maxima_ptr, sums_ptr, head * places + first_share + sequence, count, sinks_ptr, out_ptr,
                sequence, head, heads, GROUP, QUERY_LEN, HEAD_DIM, SINKS, MERGED, BLOCK_P, BLOCK_D,
            )  # fmt: skip
    return until


@triton.jit
def _merge(
    partial_ptr, maxima_ptr, sums_ptr, first_place, count, sinks_ptr, out_ptr, sequence, head, heads,
    GROUP: tl.constexpr, QUERY_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, SINKS: tl.constexpr, MERGED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The result of a sequence that several programs computed, in the order of its parts."""
    row, dim = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    ROWS: tl.constexpr = QUERY_LEN * GROUP
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_P], tl.float32)
    maximum = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for group in range(0, count, MERGED):
        theirs = ()  # all loads are under way before the first is used
        for i in tl.static_range(MERGED):
            flat = (first_place + group + i) * ROWS + row
            there = (row < ROWS) & (group + i < count)
            there_2d = there[:, None] & (dim < HEAD_DIM)[None, :]
            highest = tl.load(maxima_ptr + flat, mask=there, other=float("-inf"), cache_modifier=".cg")
            part_mass = tl.load(sums_ptr + flat, mask=there, other=0.0, cache_modifier=".cg")
            values = tl.load(
                partial_ptr + flat[:, None] * HEAD_DIM + dim[None, :], mask=there_2d, other=0.0, cache_modifier=".cg"
            )
            theirs += ((highest, part_mass, values),)  # type: ignore[assignment]  # compiled: a longer tuple
        for i in tl.static_range(MERGED):
            highest = tl.maximum(maximum, theirs[i][0])
            base = tl.where(highest == float("-inf"), 0.0, highest)
            own, its = tl.exp2(maximum - base), tl.exp2(theirs[i][0] - base)
            mass = mass * own + theirs[i][1] * its
            acc = acc * own[:, None] + theirs[i][2] * its[:, None]
            maximum = highest
    _write(
        acc, mass, maximum, sinks_ptr, out_ptr, sequence, head, heads, GROUP, QUERY_LEN, HEAD_DIM, SINKS, BLOCK_P,
        BLOCK_D,
    )  # fmt: skip


@triton.jit
def _write(
    acc, mass, maximum, sinks_ptr, out_ptr, sequence, head, heads, GROUP: tl.constexpr, QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of a sequence, of which acc [BLOCK, BLOCK_D] is the weighted sum and mass [BLOCK] the sum of weights."""
    row, dim = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    used = row < QUERY_LEN * GROUP
    q_tokens, q_heads = sequence * QUERY_LEN + row // GROUP, head * GROUP + row % GROUP
    if SINKS:
        sink = tl.load(sinks_ptr + q_heads, mask=used, other=0.0) * 1.4426950408889634
        highest = tl.maximum(maximum, sink)
        shrink = tl.exp2(maximum - highest)
        mass = mass * shrink + tl.exp2(sink - highest)
        acc = acc * shrink[:, None]
    result = acc / tl.where(used, mass, 1.0)[:, None]
    where = (q_tokens[:, None] * heads * GROUP + q_heads[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(out_ptr + where, result.to(out_ptr.dtype.element_ty), mask=used[:, None] & (dim < HEAD_DIM)[None, :])


def decode_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_tables: Tensor,
    table_rows: Tensor,
    contexts: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, in float32, sequence after sequence; what is skipped is zero."""
    batch, (tokens, num_heads, head_dim) = len(contexts), q.shape
    query_len, (_, num_kv_heads, page_size, _) = tokens // batch, k_pages.shape
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for i, context in enumerate(contexts.tolist()):
        if context == 0:
            continue
        pages = page_tables[table_rows[i], : -(-context // page_size)].long()
        k, v = (p[pages].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :context] for p in (k_pages, v_pages))
        k, v = (x.float().repeat_interleave(num_heads // num_kv_heads, 0) for x in (k, v))
        rows = slice(i * query_len, (i + 1) * query_len)
        scores = q[rows].float().transpose(0, 1) @ k.transpose(1, 2) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        own = torch.arange(context - query_len, context, device=q.device)[:, None]
        position = torch.arange(context, device=q.device)
        unseen = position > own
        if sliding_window is not None:
            unseen |= position <= own - sliding_window
        scores = scores.masked_fill(unseen, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, query_len, 1)), -1)
        out[rows] = (scores.softmax(-1)[..., :context] @ v).transpose(0, 1)
    return out
