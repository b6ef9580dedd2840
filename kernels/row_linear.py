"""Matrix products of one row, for the decode step of a single sequence: as many bytes as weights, and nothing else.

What such a product takes beyond reading its weights is latency, so a program loads all its weights into registers
before it waits for the kernel ahead (see `launch.py`): left to do after the wait is to load the row, to multiply and
add, without matrix units, and to write. The RMSNorm before a product, and the activation, the residual or rotating and
storing after it are done in the same launch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options
from penstock.kernels.rotary_store import Heads
from penstock.kernels.small_linear import small_linear_reference


class RowTiles(NamedTuple):
    """How a product of one row is cut up."""

    outputs: int  # of a program, a power of 2; with a gate, or rotated, it computes as many pairs
    warps: int  # that share the depth, 256 columns each in turn


class RowProduct(NamedTuple):
    """A product of one row that is yet to be launched."""

    x: Tensor  # [1, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    tiles: RowTiles
    norm: Tensor | None = None  # [K], weights of an RMSNorm that x goes through first
    eps: float = 0.0  # the norm's


_MOST_HELD = 160  # registers of a thread for weights of 2 bytes; twice as many with float32, where speed matters less


@cache
def row_tiles_for(outputs: int, columns: int, *, gated: bool = False, rotated: bool = False) -> RowTiles | None:
    """How to cut a product, None where it is left to others. Measured in whole steps on an H200.

    outputs: columns of the result, so half of the weight's rows if `gated`. rotated: for `row_rotary_store`.
    """
    warps = 2 if columns <= 2048 else 4 if columns <= 8192 else 8
    if rotated:
        tiles = RowTiles(2, 1 if columns <= 2048 else warps)
    elif outputs >= 1 << 16:  # a head: there are programs enough
        tiles = RowTiles(8 if columns <= 2048 else 4, warps)
    else:
        tiles = RowTiles(4 if warps == 4 and not gated else 2, warps)
    held = tiles.outputs * (2 if gated or rotated else 1) * -(-columns // (256 * tiles.warps)) * 4
    return tiles if held <= _MOST_HELD else None


def row_linear(product: RowProduct, *, gated: bool = False, residual: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, accumulated in float32 -> [1, N]; rows of x and weight have no gaps.

    gated: the first half of the columns is the gate, the result is silu(gate) * up, [1, N / 2]. residual [1, N]: the
    product is added to it in place, and it is returned.
    """
    x, weight, bias, tiles, norm, eps = product
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    out = residual if residual is not None else torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    _row_linear_kernel[(-(-outputs // tiles.outputs),)](
        x,
        norm,
        weight,
        bias,
        out,
        outputs,
        eps,
        COLUMNS=x.shape[1],
        NORM=norm is not None,
        HAS_BIAS=bias is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        BLOCK_N=tiles.outputs,
        BLOCK_K=256 * tiles.warps,
        num_warps=tiles.warps,
        **pdl_options(x),
    )
    return out


def row_rotary_store(
    product: RowProduct,
    factors: tuple[Tensor, Tensor],
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    heads: Heads,
) -> Tensor:
    """The product, then what `rotary_store_triton` does: rotated queries [1, num_heads, head_dim].

    slots: int64 [1], where the token's keys and values go; -1: nowhere. heads: without norms.

    Raises:
        ValueError: slots of the pages have gaps, or k_pages and v_pages differ in their strides.
    """
    x, weight, bias, tiles, norm, eps = product
    strides, page_size = k_pages.stride(), k_pages.shape[2]
    if strides[3] != 1 or v_pages.stride() != strides:
        raise ValueError(f"cannot store rows in pages of {strides} and {v_pages.stride()}")
    num_heads, num_kv_heads = heads.num_heads, heads.num_kv_heads
    half = weight.shape[0] // heads.in_a_row // 2
    block = min(tiles.outputs, half & -half)  # a program's outputs are of one head
    cos, sin = factors
    q = x.new_empty(1, num_heads, 2 * half)
    _row_rotary_store_kernel[(weight.shape[0] // 2 // block,)](
        x,
        norm,
        weight,
        bias,
        cos,
        sin,
        slots,
        q,
        k_pages,
        v_pages,
        strides[0],
        strides[1],
        strides[2],
        eps,
        COLUMNS=x.shape[1],
        NORM=norm is not None,
        HAS_BIAS=bias is not None,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HALF=half,
        PAGE_SIZE=page_size,
        BLOCK_N=block,
        BLOCK_K=256 * tiles.warps,
        num_warps=tiles.warps,
        **pdl_options(x),
    )
    return q


@triton.jit
def _row_linear_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,  # holds the residual, if there is one
    outputs,
    eps,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_used = n < outputs
    # Rows past the end are the first one: they are computed and thrown away.
    row = tl.where(n_used, n, 0)
    result, up = _products(
        x_ptr, norm_ptr, weight_ptr, bias_ptr, out_ptr, row, row + outputs, eps,
        COLUMNS, NORM, HAS_BIAS, GATED, RESIDUAL, BLOCK_K, PDL,
    )  # fmt: skip
    if GATED:
        result = result * tl.sigmoid(result) * up
    tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty), mask=n_used)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _row_rotary_store_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    page_stride,
    head_stride,
    slot_stride,
    eps,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0) // (HALF // BLOCK_N)
    dim = tl.program_id(0) % (HALF // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Slots and factors are as old as the step: they are read while the kernel ahead still runs (launch.py).
    slot = tl.load(slots_ptr).to(tl.int64)
    cos = tl.load(cos_ptr + dim)
    sin = tl.load(sin_ptr + dim)
    row = head * (2 * HALF) + dim
    first, second = _products(
        x_ptr, norm_ptr, weight_ptr, bias_ptr, q_ptr, row, row + HALF, eps,
        COLUMNS, NORM, HAS_BIAS, True, False, BLOCK_K, PDL,
    )  # fmt: skip
    if head < HEADS + KV_HEADS:
        first, second = first * cos - second * sin, second * cos + first * sin
    if head < HEADS:
        q = q_ptr + row
        tl.store(q, first.to(q_ptr.dtype.element_ty))
        tl.store(q + HALF, second.to(q_ptr.dtype.element_ty))
    elif slot >= 0:
        at = slot // PAGE_SIZE * page_stride + slot % PAGE_SIZE * slot_stride + dim
        if head < HEADS + KV_HEADS:
            to = k_ptr + (head - HEADS).to(tl.int64) * head_stride + at
        else:
            to = v_ptr + (head - HEADS - KV_HEADS).to(tl.int64) * head_stride + at
        tl.store(to, first.to(k_ptr.dtype.element_ty))
        tl.store(to + HALF, second.to(k_ptr.dtype.element_ty))


@triton.jit
def _products(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    added_ptr,
    first,  # [N], rows of the weight
    second,  # [N], others, if TWO
    eps,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TWO: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x times rows of the weight, twice [N], float32: norm before, bias and what is added included."""
    TILES: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    BLOCK_N: tl.constexpr = first.shape[0]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    k = tl.arange(0, BLOCK_K)[None, :]
    w = _load_tiles(weight_ptr + first.to(tl.int64)[:, None] * COLUMNS, k, COLUMNS, TILES, BLOCK_K)
    w_2 = w
    if TWO:
        w_2 = _load_tiles(weight_ptr + second.to(tl.int64)[:, None] * COLUMNS, k, COLUMNS, TILES, BLOCK_K)
    scale = w
    if NORM:
        scale = _load_tiles(norm_ptr, k, COLUMNS, TILES, BLOCK_K)
    bias = tl.zeros([BLOCK_N], tl.float32)
    bias_2 = bias
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first).to(tl.float32)
        if TWO:
            bias_2 = tl.load(bias_ptr + second).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ADD:
        bias += tl.load(added_ptr + first).to(tl.float32)
    x = _load_tiles(x_ptr, k, COLUMNS, TILES, BLOCK_K)
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_2 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for tile in tl.static_range(TILES):
        row = x[tile].to(tl.float32)
        if NORM:
            squares += row * row
            row *= scale[tile].to(tl.float32)
        acc += w[tile].to(tl.float32) * row
        if TWO:
            acc_2 += w_2[tile].to(tl.float32) * row
    if TWO:
        result, result_2 = tl.reduce((acc, acc_2), 1, _add_pairs)
    else:
        result = tl.sum(acc, 1)
        result_2 = result
    if NORM:
        factor = tl.rsqrt(tl.sum(squares) * (1.0 / COLUMNS) + eps)
        result *= factor
        result_2 *= factor
    return result + bias, result_2 + bias_2


@triton.jit
def _add_pairs(a, a_2, b, b_2):
    return a + b, a_2 + b_2


@triton.jit
def _load_tiles(row, k, COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows in tiles of BLOCK_K columns, all under way at once."""
    tiles = ()
    for tile in tl.static_range(TILES):
        at = tile * BLOCK_K + k
        if (tile + 1) * BLOCK_K <= COLUMNS:
            loaded = tl.load(row + at)
        else:
            loaded = tl.load(row + at, mask=at < COLUMNS, other=0.0)
        tiles += (loaded,)  # type: ignore[assignment]  # compiled: a longer tuple
    return tiles


def row_linear_reference(product: RowProduct, *, gated: bool = False, residual: Tensor | None = None) -> Tensor:
    """`row_linear` in plain PyTorch, in float32 up to the result; `residual` is not changed."""
    x = product.x.float()
    if product.norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + product.eps).rsqrt() * product.norm.float()
    out = small_linear_reference(x, product.weight.float(), product.bias, gated=gated, residual=residual)
    return out.to(product.x.dtype)
