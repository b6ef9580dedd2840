"""Attention of one or a few new tokens a sequence over the paged cache: memory-bound, shared out evenly.

The heads of a group share one read of their keys and values, as rows of one small matrix product; so do the query
tokens of a sequence (several in speculative decoding). Sequences are cut into splits (Flash-Decoding, Dao et al. 2023),
each by its own length: `lay_out` decides on the device, once a step, for all layers, so that programs of a captured
step are shared out by what its sequences are and not by what they might be. The program of a sequence that ends last
joins its splits (Milakov and Gimelshein 2018), which saves a launch a layer.
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
_JOINED_NUMBERS = 64 * 32  # of splits' results that a warp has under way together: 64 registers of a thread
_MOST_JOINED = 16  # splits, where their results are small
# What a plan says of a split, int32: sequence (-1: nothing to do), row of its page table, its context, where the split
# begins and ends, the sequence's first split and how many it has. The eighth fills the record up to 32 bytes.
_RECORD = tl.constexpr(8)


class Tiles(NamedTuple):
    """How the keys are cut up."""

    tokens: int  # that a program takes in one go, a power of 2
    warps: int
    stages: int
    programs: int  # a multiprocessor: as many as are there at a time


def tiles_for(head_dim: int) -> Tiles:
    """Measured on an H200."""
    return Tiles(64 if head_dim <= 128 else 32, 4, 3, 4)


@dataclass(frozen=True)
class DecodePlan:
    """Who computes what of a step's sequences; the same for all layers with a window."""

    tiles: Tiles
    resident: int  # programs of a key-value head that are there at a time
    query_len: int  # new tokens of each sequence
    sliding_window: int | None
    splits: Tensor  # int32 [programs of a head, _RECORD]
    arrived: Tensor  # int32 [B * num_kv_heads], zero between launches: how many of a sequence's splits are done

    @classmethod
    def allocate(
        cls,
        batch: int,
        query_len: int,
        num_kv_heads: int,
        head_dim: int,
        sliding_window: int | None,
        device: torch.device,
    ) -> DecodePlan:
        """For `batch` sequences with `query_len` new tokens."""
        tiles = tiles_for(head_dim)
        resident = max(1, tiles.programs * num_multiprocessors(device) // num_kv_heads)
        # Few sequences are cut into what is there at a time; with many, several rounds may be shorter than one.
        programs = resident if batch * 6 <= resident else 2 * resident + batch
        return cls(
            tiles,
            resident,
            query_len,
            sliding_window,
            torch.empty(programs, _RECORD.value, dtype=torch.int32, device=device),
            torch.zeros(batch * num_kv_heads, dtype=torch.int32, device=device),
        )

    def lay_out(self, table_rows: Tensor, contexts: Tensor) -> None:
        """Share out a step. `table_rows`, `contexts`: int32 [B], as in `decode_attention`.

        Belongs to the step's beginning (launch.py): layers read the plan while the kernel ahead of them still runs, so
        that a launch which waits for this one must lie between.
        """
        batch = contexts.shape[0]
        block = max(16, triton.next_power_of_2(batch))
        _lay_out_kernel[(1,)](
            table_rows,
            contexts,
            self.splits,
            batch,
            self.resident,
            self.splits.shape[0],
            self.sliding_window or 0,
            QUERY_LEN=self.query_len,
            WINDOW=self.sliding_window is not None,
            TILE=self.tiles.tokens,
            BLOCK_B=block,
            num_warps=min(16, max(4, block // 64)),
            **pdl_options(contexts),
        )


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_tables: Tensor,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    plan: DecodePlan,
    out: Tensor,
) -> None:
    """Causal attention of the last Q tokens of each of B sequences, into `out`; sequences of context 0 are skipped.

    Args:
        q: `[B * Q, num_heads, head_dim]`, sequence after sequence; `out` likewise, contiguous.
        k_pages, v_pages: `[num_pages, num_kv_heads, page_size, head_dim]`, one head's page contiguous, equal strides.
        page_tables: int32 `[N, W]`.
        plan: laid out for this step, and for Q; its table_rows name the row of each sequence in page_tables, its
            contexts are tokens in the cache, the Q new ones included. With a sliding window a token sees itself and
            this many less one before it.
        soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2).
        sinks: float32 `[num_heads]`, a score that takes part in the denominator only (gpt-oss).
    """
    _, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1], k_pages.shape[2]
    group, tiles = num_heads // num_kv_heads, plan.tiles
    block_rows = triton.next_power_of_2(plan.query_len * group)
    block_dim = max(16, triton.next_power_of_2(head_dim))
    programs = plan.splits.shape[0]
    # Where the splits of a sequence meet; nothing of it outlives the launch.
    partial = torch.empty(
        num_kv_heads * programs, plan.query_len * group, head_dim, dtype=torch.float32, device=q.device
    )
    maxima, sums = (torch.empty(partial.shape[:2], dtype=torch.float32, device=q.device) for _ in range(2))
    _decode_kernel[(num_kv_heads, programs)](
        q,
        k_pages,
        v_pages,
        page_tables,
        plan.splits,
        out,
        partial,
        maxima,
        sums,
        plan.arrived,
        sinks,
        scale * LOG2_E,
        soft_cap or 0.0,
        plan.sliding_window or 0,
        q.stride(0),
        q.stride(1),
        k_pages.stride(0),
        k_pages.stride(1),
        page_tables.stride(0),
        GROUP=group,
        QUERY_LEN=plan.query_len,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        BLOCK_R=max(16, block_rows),  # of a product
        BLOCK_M=block_rows,
        BLOCK_N=tiles.tokens,
        TOGETHER=max(1, min(_MOST_JOINED, _JOINED_NUMBERS * tiles.warps // (block_rows * block_dim))),
        BLOCK_D=block_dim,
        WINDOW=plan.sliding_window is not None,
        SOFT_CAP=soft_cap is not None,
        SINKS=sinks is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **pdl_options(q),
    )


@triton.jit(
    do_not_specialize=["batch", "resident", "programs"], do_not_specialize_on_alignment=["rows_ptr", "contexts_ptr"]
)
def _lay_out_kernel(
    rows_ptr, contexts_ptr, splits_ptr, batch, resident, programs, window, QUERY_LEN: tl.constexpr,
    WINDOW: tl.constexpr, TILE: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Cut B sequences into splits, and put the longest first: the short ones then fill the gaps that these leave.

    Splits of at most so many tiles take as many rounds of the card as they fill, each as long as the longest and what a
    program costs besides, about one and a half tiles. The best of 32 lengths, up to twice an even share, is taken.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    s = tl.arange(0, BLOCK_B)
    tiles = _tiles(tl.load(contexts_ptr + s, mask=s < batch, other=0), window, QUERY_LEN, WINDOW, TILE)
    even = tl.maximum(tl.cdiv(tl.sum(tiles, 0), resident), 1)
    choice = tl.arange(0, 32)
    lengths = tl.cdiv(even * (choice + 1), 16)
    counts = tl.cdiv(tiles[:, None], lengths[None, :])
    splits = tl.sum(counts, 0)
    longest = tl.max(tl.cdiv(tiles[:, None], tl.maximum(counts, 1)), 0)
    # With the last choice they always fit into the plan: they fill half of the card, and are one more a sequence.
    cost = tl.where(splits <= programs, tl.cdiv(splits, resident) * (2 * longest + 3), 1 << 30)
    most = tl.sum(tl.where(choice == tl.argmin(cost, 0), lengths, 0), 0)

    lengths = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, most), 1))
    s = tl.sort(lengths * BLOCK_B + s, descending=True) % BLOCK_B
    contexts = tl.load(contexts_ptr + s, mask=s < batch, other=0)
    tiles = _tiles(contexts, window, QUERY_LEN, WINDOW, TILE)
    counts = tl.cdiv(tiles, most)
    lengths = tl.cdiv(tiles, tl.maximum(counts, 1))
    counts = tl.cdiv(tiles, tl.maximum(lengths, 1))  # fewer, where the last ones would have had nothing
    first = tl.cumsum(counts, 0) - counts  # of a sequence's splits
    for start in range(tl.sum(counts, 0), programs, 512):  # those that have nothing to do
        unused = start + tl.arange(0, 512)
        tl.store(splits_ptr + unused * _RECORD, -1, mask=unused < programs)
    row = tl.load(rows_ptr + s, mask=s < batch, other=0)
    origin = contexts - contexts  # the first token that is looked at
    if WINDOW:
        origin = _first_seen(contexts, window, QUERY_LEN, TILE)
    for start in range(0, tl.max(counts, 0), 16):
        split = start + tl.arange(0, 16)
        there = split[None, :] < counts[:, None]
        record = splits_ptr + (first[:, None] + split[None, :]) * _RECORD
        begin = origin[:, None] + split[None, :] * lengths[:, None] * TILE
        tl.store(record, s[:, None] + 0 * split[None, :], mask=there)
        tl.store(record + 1, row[:, None] + 0 * split[None, :], mask=there)
        tl.store(record + 2, contexts[:, None] + 0 * split[None, :], mask=there)
        tl.store(record + 3, begin, mask=there)
        tl.store(record + 4, tl.minimum(begin + lengths[:, None] * TILE, contexts[:, None]), mask=there)
        tl.store(record + 5, first[:, None] + 0 * split[None, :], mask=there)
        tl.store(record + 6, counts[:, None] + 0 * split[None, :], mask=there)


@triton.jit
def _first_seen(contexts, window, QUERY_LEN: tl.constexpr, TILE: tl.constexpr):
    """The tile, as its first token, of the first token that any query token of a sequence sees."""
    return tl.maximum(contexts - QUERY_LEN + 1 - window, 0) // TILE * TILE


@triton.jit
def _tiles(contexts, window, QUERY_LEN: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """How many a sequence has."""
    if WINDOW:
        return tl.cdiv(contexts - _first_seen(contexts, window, QUERY_LEN, TILE), TILE)
    return tl.cdiv(contexts, TILE)


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, splits_ptr, out_ptr,
    partial_ptr,  # [heads, splits, rows, dim] values weighted by the splits
    maxima_ptr,  # [heads, splits, rows] of scores times log2(e)
    sums_ptr,  # [heads, splits, rows] of weights
    arrived_ptr, sinks_ptr,
    scale,  # times log2(e): exponentials are powers of two
    soft_cap, window, q_token_stride, q_head_stride, page_stride, head_stride, table_stride, GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    ROWS: tl.constexpr = QUERY_LEN * GROUP
    head, split = tl.program_id(0), tl.program_id(1)
    # The plan and page tables are as old as the step: they are read while the kernel ahead still runs (launch.py).
    record = splits_ptr + split * _RECORD
    sequence = tl.load(record)
    table_ptr = tables_ptr + tl.load(record + 1).to(tl.int64) * table_stride
    context = tl.load(record + 2)
    begin, end = tl.multiple_of(tl.load(record + 3), BLOCK_N), tl.load(record + 4)
    first_split, splits = tl.load(record + 5), tl.load(record + 6)
    k_ptr += head.to(tl.int64) * head_stride
    v_ptr += head.to(tl.int64) * head_stride
    if PDL:
        tl.extra.cuda.gdc_wait()  # in every program, or a kernel of padding only would end before the one ahead
        tl.extra.cuda.gdc_launch_dependents()
    if sequence < 0:
        return

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

    if splits == 1:
        _write(
            acc, mass, maximum, sinks_ptr, out_ptr, sequence, head, GROUP, QUERY_LEN, HEAD_DIM, SINKS, BLOCK_R, BLOCK_D
        )
        return
    part = head * tl.num_programs(1) + split
    flat = part * ROWS + row
    tl.store(maxima_ptr + flat, maximum, mask=row_used)
    tl.store(sums_ptr + flat, mass, mask=row_used)
    tl.store(partial_ptr + flat[:, None] * HEAD_DIM + dim[None, :], acc, mask=row_used[:, None] & dim_used[None, :])
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    counter = arrived_ptr + sequence * tl.num_programs(0) + head
    if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
        tl.store(counter, 0)  # for the next layer
        _join(
            partial_ptr, maxima_ptr, sums_ptr, head * tl.num_programs(1) + first_split, splits, sinks_ptr, out_ptr,
            sequence, head, GROUP, QUERY_LEN, HEAD_DIM, SINKS, TOGETHER, BLOCK_M, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _join(
    partial_ptr, maxima_ptr, sums_ptr, first, splits, sinks_ptr, out_ptr, sequence, head, GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, SINKS: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The result of a sequence that several programs computed, in the order of its splits."""
    row, dim = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    ROWS: tl.constexpr = QUERY_LEN * GROUP
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, splits, TOGETHER):
        theirs = ()  # all loads are under way before the first is used
        for i in tl.static_range(TOGETHER):
            flat = (first + start + i) * ROWS + row
            there = (row < ROWS) & (start + i < splits)
            there_2d = there[:, None] & (dim < HEAD_DIM)[None, :]
            highest = tl.load(maxima_ptr + flat, mask=there, other=float("-inf"), cache_modifier=".cg")
            part_mass = tl.load(sums_ptr + flat, mask=there, other=0.0, cache_modifier=".cg")
            values = tl.load(
                partial_ptr + flat[:, None] * HEAD_DIM + dim[None, :], mask=there_2d, other=0.0, cache_modifier=".cg"
            )
            theirs += ((highest, part_mass, values),)  # type: ignore[assignment]  # compiled: a longer tuple
        for i in tl.static_range(TOGETHER):
            highest = tl.maximum(maximum, theirs[i][0])
            base = tl.where(highest == float("-inf"), 0.0, highest)
            own, its = tl.exp2(maximum - base), tl.exp2(theirs[i][0] - base)
            mass = mass * own + theirs[i][1] * its
            acc = acc * own[:, None] + theirs[i][2] * its[:, None]
            maximum = highest
    _write(acc, mass, maximum, sinks_ptr, out_ptr, sequence, head, GROUP, QUERY_LEN, HEAD_DIM, SINKS, BLOCK, BLOCK_D)


@triton.jit
def _write(
    acc, mass, maximum, sinks_ptr, out_ptr, sequence, head, GROUP: tl.constexpr, QUERY_LEN: tl.constexpr,
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
    where = (q_tokens[:, None] * tl.num_programs(0) * GROUP + q_heads[:, None]) * HEAD_DIM + dim[None, :]
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
