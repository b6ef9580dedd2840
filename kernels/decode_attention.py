"""Attention of one or a few new tokens a sequence over the paged cache: memory-bound, split over the sequence.

The heads of a group share one read of their keys and values, as rows of one small matrix product; so do the query
tokens of a sequence (several in speculative decoding). A sequence is cut into splits of equal length (Flash-Decoding,
Dao et al. 2023) and the program that ends last merges them (Milakov and Gimelshein 2018), which saves a launch a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import num_multiprocessors, pdl_options

LOG2_E = 1.4426950408889634
_MOST_SPLITS = 64


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where the splits of a step meet; the same for all its layers. `arrived` is zero between launches."""

    splits: int
    arrived: Tensor  # int32 [B * num_kv_heads]
    partial: Tensor  # float32 [B * num_kv_heads * splits, rows, head_dim]
    maxima: Tensor  # float32 [B * num_kv_heads * splits, rows], of scores times log2(e)
    sums: Tensor  # the same

    @classmethod
    def allocate(
        cls, batch: int, rows: int, num_kv_heads: int, head_dim: int, max_context: int, device: torch.device
    ) -> DecodeWorkspace:
        """For `batch` sequences, `rows` query rows a key-value head (query tokens times group)."""
        splits = _splits(batch * num_kv_heads, max_context, num_multiprocessors(device))
        parts = batch * num_kv_heads * splits if splits > 1 else 0
        return cls(
            splits,
            torch.zeros(batch * num_kv_heads, dtype=torch.int32, device=device),
            torch.empty(parts, rows, head_dim, dtype=torch.float32, device=device),
            torch.empty(parts, rows, dtype=torch.float32, device=device),
            torch.empty(parts, rows, dtype=torch.float32, device=device),
        )


def _splits(heads: int, max_context: int, multiprocessors: int) -> int:
    """Programs a (sequence, head), at most four a multiprocessor in all and none shorter than a tile.

    Measured on an H200: a few programs more than fit at once cost a fifth (batch 32 at 8192 tokens: 253 us in two
    splits, 299 in three).
    """
    wanted = max(1, 4 * multiprocessors // heads)
    return max(1, min(wanted, _MOST_SPLITS, -(-max_context // _TILE)))


_TILE = 64  # tokens that a program takes in one go: enough for the memory's rate, few enough for one sequence's latency
_MERGED_AT_ONCE = 8 * 16 * 128  # numbers of splits' results that are under way together: 128 registers of a thread


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
    block_rows = max(16, 1 << (query_len * group - 1).bit_length())
    block_dim = max(16, 1 << (head_dim - 1).bit_length())
    # Splits come last: programs go to multiprocessors in turn, and those of the last splits have less or nothing to do.
    _decode_kernel[(num_kv_heads, batch, workspace.splits)](
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
        workspace.splits,
        GROUP=group,
        QUERY_LEN=query_len,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        MERGE=workspace.splits > 1,
        BLOCK_R=block_rows,
        BLOCK_N=_TILE,
        MERGED=max(1, min(8, _MERGED_AT_ONCE // (block_rows * block_dim))),
        BLOCK_D=block_dim,
        WINDOW=sliding_window is not None,
        SOFT_CAP=soft_cap is not None,
        SINKS=sinks is not None,
        num_warps=4,
        num_stages=3 if head_dim <= 128 else 2,
        **pdl_options(q),
    )


@triton.jit(do_not_specialize=["table_stride", "splits"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    rows_ptr,
    contexts_ptr,
    out_ptr,
    partial_ptr,
    maxima_ptr,
    sums_ptr,
    arrived_ptr,
    sinks_ptr,
    scale,  # times log2(e): exponentials are powers of two
    soft_cap,
    window,
    q_token_stride,
    q_head_stride,
    page_stride,
    head_stride,
    table_stride,
    splits,
    GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MERGE: tl.constexpr,  # whether there are several splits
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Lengths and page tables are as old as the step: they are read while the kernel ahead still runs (launch.py).
    context = tl.load(contexts_ptr + sequence)
    table_row = tl.load(rows_ptr + sequence)
    first = 0
    if WINDOW:
        first = tl.maximum(context - QUERY_LEN + 1 - window, 0) // BLOCK_N * BLOCK_N
    length = tl.cdiv(tl.cdiv(context - first, splits), BLOCK_N) * BLOCK_N
    begin = first + split * length
    end = tl.minimum(begin + length, context)
    table_ptr = tables_ptr + table_row.to(tl.int64) * table_stride
    k_ptr += head.to(tl.int64) * head_stride
    v_ptr += head.to(tl.int64) * head_stride
    if PDL:
        tl.extra.cuda.gdc_wait()  # in every program, or a kernel of padding only would end before the one ahead
        tl.extra.cuda.gdc_launch_dependents()
    if begin >= end:
        return

    row = tl.arange(0, BLOCK_R)
    token, member = row // GROUP, row % GROUP
    row_used = row < QUERY_LEN * GROUP
    dim = tl.arange(0, BLOCK_D)
    dim_used = dim < HEAD_DIM
    q_heads = head * GROUP + member
    q_tokens = sequence * QUERY_LEN + token
    q = tl.load(
        q_ptr + q_tokens[:, None] * q_token_stride + q_heads[:, None] * q_head_stride + dim[None, :],
        mask=row_used[:, None] & dim_used[None, :],
        other=0.0,
    )
    last_seen = context - QUERY_LEN + token  # position of the row's own token

    maximum = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
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
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        maximum = highest

    if MERGE:
        unit = (sequence * tl.num_programs(0) + head) * splits
        flat = (unit + split) * (QUERY_LEN * GROUP) + row
        tl.store(maxima_ptr + flat, maximum, mask=row_used)
        tl.store(sums_ptr + flat, total, mask=row_used)
        where = flat.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(partial_ptr + where, acc, mask=row_used[:, None] & dim_used[None, :])
        tl.debug_barrier()  # every thread's stores come before the one thread's release
        present = tl.cdiv(context - first, length)
        counter = arrived_ptr + sequence * tl.num_programs(0) + head
        if tl.atomic_add(counter, 1, sem="acq_rel") != present - 1:
            return
        tl.store(counter, 0)  # for the next layer
        maximum = tl.full([BLOCK_R], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for group in range(0, present, MERGED):
            theirs = ()
            for i in tl.static_range(MERGED):
                flat = (unit + group + i) * (QUERY_LEN * GROUP) + row
                there = row_used & (group + i < present)
                where = flat.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
                there_2d = there[:, None] & dim_used[None, :]
                highest = tl.load(maxima_ptr + flat, mask=there, other=float("-inf"), cache_modifier=".cg")
                part_sum = tl.load(sums_ptr + flat, mask=there, other=0.0, cache_modifier=".cg")
                part = tl.load(partial_ptr + where, mask=there_2d, other=0.0, cache_modifier=".cg")
                theirs += ((highest, part_sum, part),)  # type: ignore[assignment]  # compiled: a longer tuple
            for i in tl.static_range(MERGED):
                highest = tl.maximum(maximum, theirs[i][0])
                base = tl.where(highest == float("-inf"), 0.0, highest)
                mine, its = tl.exp2(maximum - base), tl.exp2(theirs[i][0] - base)
                total = total * mine + theirs[i][1] * its
                acc = acc * mine[:, None] + theirs[i][2] * its[:, None]
                maximum = highest

    if SINKS:
        sink = tl.load(sinks_ptr + q_heads, mask=row_used, other=0.0) * LOG2E
        highest = tl.maximum(maximum, sink)
        shrink = tl.exp2(maximum - highest)
        total = total * shrink + tl.exp2(sink - highest)
        acc = acc * shrink[:, None]
    result = acc / tl.where(row_used, total, 1.0)[:, None]
    out_where = (q_tokens[:, None] * tl.num_programs(0) * GROUP + q_heads[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(out_ptr + out_where, result.to(out_ptr.dtype.element_ty), mask=row_used[:, None] & dim_used[None, :])


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
