"""From the joined query-key-value projection to attention's inputs: norms, rotation, and storing in one launch.

A layer calls it between its projection and its attention: queries come back, keys and values go into the page cache.
Queries and keys are normalised per head where the model does that (Qwen3), then rotated (Su et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options, use_triton
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.rms_norm import rms_norm_reference
from penstock.kernels.rotary import rotary


@dataclass(frozen=True)
class Heads:
    """How a row of the joined projection is cut: queries, keys, values, heads of one size; and what normalises them.

    q_norm, k_norm: weights `[head_dim]` of RMSNorms with `eps`, of each query head and each key head; both or none.

    Raises:
        ValueError: only one of the norms is given.
    """

    num_heads: int
    num_kv_heads: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0

    def __post_init__(self) -> None:
        if (self.q_norm is None) != (self.k_norm is None):
            raise ValueError("queries and keys are normalised both or not at all")

    @property
    def in_a_row(self) -> int:
        """All heads of a row."""
        return self.num_heads + 2 * self.num_kv_heads


def rotary_store(
    qkv: Tensor,
    factors: tuple[Tensor, Tensor],
    k_pages: Tensor,
    v_pages: Tensor,
    batch: PagedBatch,
    heads: Heads,
) -> Tensor:
    """The rotated queries [T, num_heads, head_dim]; the rotated keys and the values are stored in the batch's slots.

    Args:
        qkv: `[T, heads.in_a_row * head_dim]`.
        factors: what `rotary_factors` gives for the batch's positions.
        k_pages, v_pages: `[num_pages, num_kv_heads, page_size, head_dim]`, any strides but the last.
    """
    op = rotary_store_triton if use_triton(qkv) else rotary_store_reference
    return op(qkv, factors, k_pages, v_pages, batch, heads)


def rotary_store_reference(
    qkv: Tensor,
    factors: tuple[Tensor, Tensor],
    k_pages: Tensor,
    v_pages: Tensor,
    batch: PagedBatch,
    heads: Heads,
) -> Tensor:
    """`rotary_store` in plain PyTorch, for a batch without padding; the queries are a view with gaps.

    factors: those of `rotary_factors_reference`.
    """
    sizes = heads.num_heads, heads.num_kv_heads
    turning, v = qkv.view(len(qkv), heads.in_a_row, -1).split_with_sizes((sum(sizes), heads.num_kv_heads), 1)
    if heads.q_norm is not None and heads.k_norm is not None:
        q, k = turning.split_with_sizes(sizes, 1)
        q, k = rms_norm_reference(q, heads.q_norm, heads.eps), rms_norm_reference(k, heads.k_norm, heads.eps)
        turning = torch.cat((q, k), 1)
    q, k = rotary(turning, *factors).split_with_sizes(sizes, 1)
    store_kv(k, v, k_pages, v_pages, batch)
    return q


def store_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, batch: PagedBatch) -> None:
    """Write the new tokens' keys and values, [T, num_kv_heads, head_dim], into their slots."""
    k_pages[batch.slot_pages, :, batch.slot_offsets] = k
    v_pages[batch.slot_pages, :, batch.slot_offsets] = v


def rotary_store_triton(
    qkv: Tensor,
    factors: tuple[Tensor, Tensor],
    k_pages: Tensor,
    v_pages: Tensor,
    batch: PagedBatch,
    heads: Heads,
) -> Tensor:
    """`rotary_store` in one launch, rounded once at the end; the queries are contiguous.

    Tokens whose slot is -1 are padding: they store nothing, and their queries mean nothing.

    factors: those of `rotary_factors_triton`.

    Raises:
        ValueError: rows of qkv or slots of the pages have gaps, or k_pages and v_pages differ in their strides.
    """
    tokens, width = qkv.shape
    num_heads, num_kv_heads, q_norm, k_norm = heads.num_heads, heads.num_kv_heads, heads.q_norm, heads.k_norm
    head_dim = width // heads.in_a_row
    strides = k_pages.stride()
    if qkv.stride(1) != 1 or strides[3] != 1 or v_pages.stride() != strides:
        raise ValueError(f"cannot store rows of strides {qkv.stride()} in pages of {strides} and {v_pages.stride()}")
    cos, sin = factors
    q = qkv.new_empty((tokens, num_heads, head_dim))
    parts, q_block, kv_block, block, num_warps = _program_shape(tokens, num_heads, num_kv_heads, head_dim // 2)
    _rotary_store_kernel[(tokens * parts,)](
        qkv,
        cos,
        sin,
        cos if q_norm is None else q_norm,
        cos if k_norm is None else k_norm,
        batch.slots,
        q,
        k_pages,
        v_pages,
        qkv.stride(0),
        strides[0],
        strides[1],
        strides[2],
        heads.eps,
        PAGE_SIZE=batch.page_size,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        PARTS=parts,
        Q_BLOCK=q_block,
        KV_BLOCK=kv_block,
        BLOCK=block,
        NORM=q_norm is not None and k_norm is not None,
        num_warps=num_warps,
        **pdl_options(qkv),
    )
    return q


def _program_shape(tokens: int, num_heads: int, num_kv_heads: int, half: int) -> tuple[int, int, int, int, int]:
    """Programs a token; of each, its heads of queries, of keys, and half their length, as powers of two; its warps.

    Few tokens are split until the card is busy: every program is then one short chain of load, rotate and store. Many
    tokens take a program each, so that starting programs does not take longer than moving their bytes. A thread holds
    8 elements of each half of the queries (one 16-byte access of a 2-byte type), or 16 where a program is large.
    """
    parts = 1
    while 4 * parts < num_heads and 2 * parts * tokens <= 1024:
        parts *= 2
    q_block = 1 << (-(-num_heads // parts) - 1).bit_length()
    kv_block = 1 << (-(-num_kv_heads // parts) - 1).bit_length()
    block = 1 << (half - 1).bit_length()
    num_warps = q_block * block // (512 if parts == 1 else 256)
    return parts, q_block, kv_block, block, min(max(num_warps, 1), 4)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rotary_store_kernel(
    qkv,  # [T, (HEADS + 2 * KV_HEADS) * 2 * HALF]
    cos,  # [T, HALF]
    sin,  # [T, HALF]
    q_norm,  # [2 * HALF]
    k_norm,  # [2 * HALF]
    slots,  # [T]
    q_out,  # [T, HEADS, 2 * HALF]
    k_pages,
    v_pages,
    token_stride,
    page_stride,
    head_stride,
    slot_stride,
    eps,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    q_share: tl.constexpr = (HEADS + PARTS - 1) // PARTS
    kv_share: tl.constexpr = (KV_HEADS + PARTS - 1) // PARTS
    column = tl.arange(0, BLOCK)[None, :]
    q_row = tl.arange(0, Q_BLOCK)[:, None]
    kv_row = tl.arange(0, KV_BLOCK)[:, None]
    q_head = part * q_share + q_row
    kv_head = part * kv_share + kv_row
    real = column < HALF
    q_mask = (q_row < q_share) & (q_head < HEADS) & real
    kv_mask = (kv_row < kv_share) & (kv_head < KV_HEADS) & real
    if NORM:
        q_scale_1 = tl.load(q_norm + column, real, other=0.0).to(tl.float32)
        q_scale_2 = tl.load(q_norm + HALF + column, real, other=0.0).to(tl.float32)
        k_scale_1 = tl.load(k_norm + column, real, other=0.0).to(tl.float32)
        k_scale_2 = tl.load(k_norm + HALF + column, real, other=0.0).to(tl.float32)
    # Slots and factors are older than the product ahead: they are read while it still runs (launch.py).
    slot = tl.load(slots + token).to(tl.int64)
    # The factors are loaded in the shape of what they multiply: then no thread needs another's.
    q_factor = tl.broadcast_to(token * HALF + column, Q_BLOCK, BLOCK)
    k_factor = tl.broadcast_to(token * HALF + column, KV_BLOCK, BLOCK)
    q_cos = tl.load(cos + q_factor, q_mask, other=0.0)
    q_sin = tl.load(sin + q_factor, q_mask, other=0.0)
    k_cos = tl.load(cos + k_factor, kv_mask, other=0.0)
    k_sin = tl.load(sin + k_factor, kv_mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    # All loads before the first store, to be in flight together: the compiler may not move them past a store.
    q_from = qkv + token * token_stride + q_head * (2 * HALF) + column
    k_from = qkv + token * token_stride + (HEADS + kv_head) * (2 * HALF) + column
    v_from = k_from + KV_HEADS * (2 * HALF)
    q_1 = tl.load(q_from, q_mask, other=0.0)
    q_2 = tl.load(q_from + HALF, q_mask, other=0.0)
    k_1 = tl.load(k_from, kv_mask, other=0.0)
    k_2 = tl.load(k_from + HALF, kv_mask, other=0.0)
    v_1 = tl.load(v_from, kv_mask, other=0.0)
    v_2 = tl.load(v_from + HALF, kv_mask, other=0.0)

    if NORM:
        q_1, q_2 = _normed(q_1, q_2, q_scale_1, q_scale_2, eps, 2 * HALF)
        k_1, k_2 = _normed(k_1, k_2, k_scale_1, k_scale_2, eps, 2 * HALF)
    kind = q_out.dtype.element_ty
    q_to = q_out + (token * HEADS + q_head) * (2 * HALF) + column
    q_1, q_2 = q_1.to(tl.float32), q_2.to(tl.float32)
    tl.store(q_to, (q_1 * q_cos - q_2 * q_sin).to(kind), q_mask)
    tl.store(q_to + HALF, (q_2 * q_cos + q_1 * q_sin).to(kind), q_mask)

    page = slot // PAGE_SIZE
    to = page * page_stride + kv_head.to(tl.int64) * head_stride + slot % PAGE_SIZE * slot_stride + column
    kv_mask = kv_mask & (slot >= 0)
    k_1, k_2 = k_1.to(tl.float32), k_2.to(tl.float32)
    kind = k_pages.dtype.element_ty
    tl.store(k_pages + to, (k_1 * k_cos - k_2 * k_sin).to(kind), kv_mask)
    tl.store(k_pages + to + HALF, (k_2 * k_cos + k_1 * k_sin).to(kind), kv_mask)
    tl.store(v_pages + to, v_1, kv_mask)
    tl.store(v_pages + to + HALF, v_2, kv_mask)


@triton.jit
def _normed(x_1, x_2, scale_1, scale_2, eps, N: tl.constexpr):
    """Both halves of heads, normalised; rounded to their type before the weight, as `rms_norm` does."""
    wide_1, wide_2 = x_1.to(tl.float32), x_2.to(tl.float32)
    mean = tl.sum(wide_1 * wide_1 + wide_2 * wide_2, 1, keep_dims=True) * (1.0 / N)
    factor = tl.rsqrt(mean + eps)
    wide_1 = (wide_1 * factor).to(x_1.dtype).to(tl.float32)
    wide_2 = (wide_2 * factor).to(x_2.dtype).to(tl.float32)
    return wide_1 * scale_1, wide_2 * scale_2
