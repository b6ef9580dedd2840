"""Prefill attention for Hopper, warp-specialised, in Gluon; launched by prefill_hopper.py.

The schedule of FlashAttention-3 (Shah et al. 2024): one warp brings blocks of keys and values into shared memory with
the bulk copy engine, straight from their pages; two groups of four warps compute 64 rows each, and in each the softmax
of one block runs while the matrix units multiply the weights of the block before with its values. A row is a pair (new
token, head of the group). Blocks are taken from the last keys to the first, so that those that need a mask come first.

Gluon has no interpreter: the plain form of this kernel is `prefill_triton`, and a test compiles this one for the card.
"""

from __future__ import annotations

from triton.experimental import gluon as triton_gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.kernels.prefill_splits import NOTHING

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7, 3.6


@triton_gluon.jit
def _softmax(
    scores, top, total, first_key, positions, factors, MASKED: gl.constexpr, WINDOW: gl.constexpr,
    SOFT_CAP: gl.constexpr, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Weights of a block of scores, the factor for what was summed before, and the new running values."""
    scale, soft_cap, window = factors
    if SOFT_CAP:  # tanh(x) = 1 - 2 / (1 + e^2x)
        turned = 1.0 - 2.0 / (1.0 + gl.exp2(scores * (scale / soft_cap * (2 * 1.4426950408889634))))
        scores = turned * (soft_cap * 1.4426950408889634)
        scale = 1.0
    if MASKED:
        token = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        seen = token[None, :] <= positions[:, None]
        if WINDOW:
            seen &= token[None, :] > positions[:, None] - window
        # Finite, so that a row that sees nothing yet has no NaN; its first real score takes all weight from it.
        # Scaled before: fused with the subtraction below, rounding would make it 2**(error of 1e30), 0 or infinite.
        scores = gl.where(seen, scores * scale, -1e30)
        scale = 1.0
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_top[:, None])
    fade = gl.exp2(top - new_top)
    total = total * fade + gl.sum(weights, 1)
    return weights, fade, new_top, total


@triton_gluon.jit
def _step(
    i, acc, weights, top, total, q_smem, ring, last_block, num_blocks, positions, factors, MASKED: gl.constexpr,
    WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Block i's scores and softmax while block i - 1's weights meet their values; block i's keys are there."""
    k_smem, v_smem, k_ready, k_free, v_ready, v_free = ring
    stage = i % STAGES
    before = (i - 1) % STAGES
    zeros = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    scores = hopper.warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    hopper.mbarrier.wait(v_ready.index(before), ((i - 1) // STAGES) & 1)
    operand = gl.convert_layout(weights.to(v_smem.dtype), gl.DotOperandLayout(0, OUT, 2))
    acc = hopper.warpgroup_mma(operand, v_smem.index(before), acc, is_async=True)
    scores = hopper.warpgroup_mma_wait(1, deps=[scores])
    _barrier()
    hopper.mbarrier.arrive(k_free.index(stage), count=1)
    first_key = (last_block - i) * BLOCK_N
    weights, fade, top, total = _softmax(
        scores, top, total, first_key, positions, factors, MASKED, WINDOW, SOFT_CAP, SCORES, BLOCK_N
    )
    # The next keys are awaited here because the assembler moves no work across a loop: without it, it would wait for
    # the products first and compute the softmax with idle matrix units. So too are the weights named as a dependency.
    after = i + 1
    hopper.mbarrier.wait(k_ready.index(after % STAGES), (after // STAGES) & 1, pred=after < num_blocks)
    acc, weights = hopper.warpgroup_mma_wait(0, deps=[acc, weights])
    _barrier()
    hopper.mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
    return acc, weights, top, total


@triton_gluon.jit
def _compute(
    q_ptr, out_ptr, masses_ptr, sinks_ptr, q_smem, ring, part, place, strides, factors, GROUP: gl.constexpr,
    WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, NUM_HEADS: gl.constexpr, SPLITS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps' 64 rows, over all their keys or a split of them."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    PIECE: gl.constexpr = BLOCK_N // 4
    k_smem, v_smem, k_ready, k_free, v_ready, _v_free = ring
    kv_head, split_token, first_token, num_queries, past, block, last_block, num_blocks = place
    q_token_stride, q_head_stride, out_token_stride, out_head_stride = strides
    if num_blocks > 0:
        first_row = block * BLOCK_M + part * 64
        rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, LOAD))
        tokens = (first_token + gl.minimum(rows // GROUP, num_queries - 1)).to(gl.int64)
        heads = kv_head * GROUP + rows % GROUP
        column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LOAD))
        q_smem.store(gl.load(q_ptr + (tokens * q_token_stride + heads * q_head_stride)[:, None] + column[None, :]))
        hopper.fence_async_shared()
        _barrier()

        score_rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        positions = past + gl.minimum(score_rows // GROUP, num_queries - 1)
        top = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([64, BLOCK_D], gl.float32, OUT)

        hopper.mbarrier.wait(k_ready.index(0), 0)
        zeros = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
        scores = hopper.warpgroup_mma(q_smem, k_smem.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = hopper.warpgroup_mma_wait(0, deps=[scores])
        _barrier()
        hopper.mbarrier.arrive(k_free.index(0), count=1)
        first_key = last_block * BLOCK_N
        weights, _fade, top, total = _softmax(
            scores, top, total, first_key, positions, factors, True, WINDOW, SOFT_CAP, SCORES, BLOCK_N
        )

        # Slots past the context hold anything, NaN too: a weight of zero would not silence them.
        context = past + num_queries
        if context < first_key + BLOCK_N:
            hopper.mbarrier.wait(v_ready.index(0), 0)
            for piece in gl.static_range(4):
                token = first_key + piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, LOAD))
                values = v_smem.index(0).slice(piece * PIECE, PIECE)
                values.store(gl.where((token < context)[:, None], values.load(LOAD), 0.0))
            hopper.fence_async_shared()
            _barrier()

        # Blocks of keys from full_begin to full_end are seen by every row.
        full_end = (past + block * BLOCK_M // GROUP + 1) // BLOCK_N
        num_masked = gl.maximum(gl.minimum(last_block + 1 - full_end, num_blocks), 1)
        num_full = num_blocks
        if WINDOW:
            high = past + gl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1)
            full_begin = (gl.maximum(high - factors[2] + 1, 0) + BLOCK_N - 1) // BLOCK_N
            num_full = gl.maximum(gl.minimum(last_block + 1 - full_begin, num_blocks), num_masked)
        hopper.mbarrier.wait(k_ready.index(1 % STAGES), (1 // STAGES) & 1, pred=num_blocks > 1)
        for i in range(1, num_masked):
            acc, weights, top, total = _step(
                i, acc, weights, top, total, q_smem, ring, last_block, num_blocks, positions, factors, True, WINDOW,
                SOFT_CAP, SCORES, OUT, BLOCK_N, STAGES,
            )  # fmt: skip
        for i in range(num_masked, num_full):
            acc, weights, top, total = _step(
                i, acc, weights, top, total, q_smem, ring, last_block, num_blocks, positions, factors, False, WINDOW,
                SOFT_CAP, SCORES, OUT, BLOCK_N, STAGES,
            )  # fmt: skip
        if WINDOW:
            for i in range(num_full, num_blocks):
                acc, weights, top, total = _step(
                    i, acc, weights, top, total, q_smem, ring, last_block, num_blocks, positions, factors, True, WINDOW,
                    SOFT_CAP, SCORES, OUT, BLOCK_N, STAGES,
                )  # fmt: skip
        last = num_blocks - 1
        hopper.mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)
        operand = gl.convert_layout(weights.to(v_smem.dtype), gl.DotOperandLayout(0, OUT, 2))
        acc = hopper.warpgroup_mma(operand, v_smem.index(last % STAGES), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])

        top = gl.convert_layout(top, gl.SliceLayout(1, OUT))
        total = gl.convert_layout(total, gl.SliceLayout(1, OUT))
        if SPLITS:  # straight from registers: four lanes write 32 bytes in a row
            out_rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, OUT))
            own = out_rows < num_queries * GROUP
            row = (split_token + out_rows // GROUP) * NUM_HEADS + kv_head * GROUP + out_rows % GROUP
            gl.store(masses_ptr + row, top + gl.log2(total), mask=own)
            where = row.to(gl.int64)[:, None] * BLOCK_D + gl.arange(0, BLOCK_D, gl.SliceLayout(0, OUT))[None, :]
            gl.store(out_ptr + where, acc / total[:, None], mask=own[:, None])
        else:
            if SINKS:
                out_rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, OUT))
                sink = gl.load(sinks_ptr + kv_head * GROUP + out_rows % GROUP).to(gl.float32) * 1.4426950408889634
                new_top = gl.maximum(top, sink)
                fade = gl.exp2(top - new_top)
                total = total * fade + gl.exp2(sink - new_top)
                acc = acc * fade[:, None]
            result = gl.convert_layout((acc / total[:, None]).to(out_ptr.dtype.element_ty), LOAD)
            where = (tokens * out_token_stride + heads * out_head_stride)[:, None] + column[None, :]
            gl.store(out_ptr + where, result, mask=(rows < num_queries * GROUP)[:, None])
    elif SPLITS:
        _saw_nothing(masses_ptr, block * BLOCK_M + part * 64, split_token, num_queries, kv_head, GROUP, NUM_HEADS)


@triton_gluon.jit
def _saw_nothing(
    masses_ptr, first_row, split_token, num_queries, kv_head, GROUP: gl.constexpr, NUM_HEADS: gl.constexpr
):  # fmt: skip
    rows = first_row + gl.arange(0, 64, gl.BlockedLayout([1], [32], [4], [0]))
    where = (split_token + rows // GROUP) * NUM_HEADS + kv_head * GROUP + rows % GROUP
    gl.store(masses_ptr + where, rows * 0.0 + NOTHING, mask=(rows >= 0) & (rows < num_queries * GROUP))


@triton_gluon.jit
def _fetch(
    kv_desc, tables_ptr, table_rows_ptr, table_stride, ring, sequence, kv_head, num_pages, last_block, num_blocks,
    page_rows, head_rows, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp brings the blocks of K and V into shared memory, the last first."""
    PIECE: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    PIECES: gl.constexpr = BLOCK_N // PIECE
    k_smem, v_smem, k_ready, k_free, v_ready, v_free = ring
    if PDL:
        gdc_wait()
    if num_blocks > 0:
        table = tables_ptr + gl.load(table_rows_ptr + sequence).to(gl.int64) * table_stride
        for i in range(0, num_blocks):
            first_key = (last_block - i) * BLOCK_N
            stage = i % STAGES
            phase = ((i // STAGES) & 1) ^ 1
            pages = ()  # read while the barrier is still closed
            for piece in gl.static_range(PIECES):
                token = first_key + piece * PIECE
                page = gl.load(table + gl.minimum(token // PAGE_SIZE, num_pages - 1))
                pages += (page * page_rows + kv_head * head_rows + token % PAGE_SIZE,)  # type: ignore[assignment]
            for kind in gl.static_range(2):  # keys, then values, which lie right behind them
                smem = v_smem if kind else k_smem
                ready = v_ready if kind else k_ready
                free = v_free if kind else k_free
                hopper.mbarrier.wait(free.index(stage), phase)
                hopper.mbarrier.expect(ready.index(stage), BLOCK_N * BLOCK_D * 2)
                for piece in gl.static_range(PIECES):
                    row = pages[piece] + kind * PAGE_SIZE
                    target = smem.index(stage).slice(piece * PIECE, PIECE)
                    hopper.tma.async_copy_global_to_shared(kv_desc, [row, 0], ready.index(stage), target)


@triton_gluon.jit(
    do_not_specialize=["num_sequences", "num_tokens", "splits"],
    do_not_specialize_on_alignment=["table_rows_ptr", "query_starts_ptr", "contexts_ptr"],
)
def hopper_kernel(
    kv_desc, q_ptr,
    out_ptr,  # [T, heads, dim], or the splits' means
    masses_ptr,  # the splits'
    sinks_ptr, tables_ptr, table_rows_ptr, query_starts_ptr, contexts_ptr, num_sequences, num_tokens, splits,
    table_stride, q_token_stride, q_head_stride, out_token_stride, out_head_stride, page_rows, head_rows, scale,
    soft_cap, window, GROUP: gl.constexpr, PAGE_SIZE: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
    SINKS: gl.constexpr, NUM_HEADS: gl.constexpr, SPLITS: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    kv_head = gl.program_id(0)
    split = 0
    if SPLITS:
        split = kv_head % splits
        kv_head = kv_head // splits
    block = gl.program_id(1)

    # Sequence s has the blocks from starts[s] * GROUP // BLOCK_M + s on: room for all its rows, whatever they are.
    index = gl.arange(0, BLOCK_S, gl.BlockedLayout([1], [32], [4], [0]))
    starts = gl.load(query_starts_ptr + index, mask=index < num_sequences, other=0) - gl.load(query_starts_ptr)
    firsts = starts * GROUP // BLOCK_M + index
    sequence = gl.sum(((firsts <= block) & (index < num_sequences)).to(gl.int32), 0) - 1
    first_token = gl.load(query_starts_ptr + sequence)
    num_queries = gl.load(query_starts_ptr + sequence + 1) - first_token
    context = gl.load(contexts_ptr + sequence)
    past = context - num_queries
    # The last rows see most: they start first.
    block = gl.cdiv(num_queries * GROUP, BLOCK_M) - 1 - (block - gl.sum(gl.where(index == sequence, firsts, 0), 0))
    low = past + block * BLOCK_M // GROUP
    high = past + gl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1)
    last_block = high // BLOCK_N
    lowest_block = 0
    if WINDOW:
        lowest_block = gl.maximum(low - window + 1, 0) // BLOCK_N
    num_blocks = gl.where((block >= 0) & (context > 0), last_block - lowest_block + 1, 0)
    if SPLITS:
        share = gl.cdiv(num_blocks, splits)
        last_block -= split * share
        num_blocks = gl.maximum(gl.minimum(share, num_blocks - split * share), 0)
    split_token = split * num_tokens + first_token
    # Lengths are as old as the step (launch.py): so far the kernel ahead could still run.
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    ELEMENT: gl.constexpr = q_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(min(128, BLOCK_D * 2), 16, 2)
    BARRIER: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(ELEMENT, [2, 64, BLOCK_D], SHARED)
    k_smem = gl.allocate_shared_memory(ELEMENT, [STAGES, BLOCK_N, BLOCK_D], SHARED)
    v_smem = gl.allocate_shared_memory(ELEMENT, [STAGES, BLOCK_N, BLOCK_D], SHARED)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(k_ready.index(stage), count=1)
        hopper.mbarrier.init(k_free.index(stage), count=2)
        hopper.mbarrier.init(v_ready.index(stage), count=1)
        hopper.mbarrier.init(v_free.index(stage), count=2)
    hopper.fence_async_shared()

    ring = (k_smem, v_smem, k_ready, k_free, v_ready, v_free)
    place = (kv_head, split_token, first_token, num_queries, past, block, last_block, num_blocks)
    strides = (q_token_stride, q_head_stride, out_token_stride, out_head_stride)
    factors = (scale, soft_cap, window)
    num_pages = gl.cdiv(context, PAGE_SIZE)
    gl.warp_specialize(
        [
            (_compute, (
                q_ptr, out_ptr, masses_ptr, sinks_ptr, q_smem.index(0), ring, 0, place, strides, factors, GROUP, WINDOW,
                SOFT_CAP, SINKS, NUM_HEADS, SPLITS, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
            )),
            (_compute, (
                q_ptr, out_ptr, masses_ptr, sinks_ptr, q_smem.index(1), ring, 1, place, strides, factors, GROUP, WINDOW,
                SOFT_CAP, SINKS, NUM_HEADS, SPLITS, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
            )),
            (_fetch, (
                kv_desc, tables_ptr, table_rows_ptr, table_stride, ring, sequence, kv_head, num_pages, last_block,
                num_blocks, page_rows, head_rows, PAGE_SIZE, BLOCK_N, BLOCK_D, STAGES, PDL,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
