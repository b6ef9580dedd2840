"""Matrix products with few rows, for decode: every weight is read once, so only memory and launches count.

A program computes a strip of outputs for all rows, over all or a part of the depth; where a strip is cut into parts
(the product has too few strips to fill the card), the program that ends last adds them up, in a fixed order. The gated
activation or the residual addition that follows a product is done in the same launch. While the kernel ahead still
runs, a program already asks for its weights (see `launch.py`).
A program may also take several strips one after the other, where a strip's tiles fill so much shared memory that few
programs run at a time: the first tiles of its next strip are then under way before the last one is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options

MAX_ROWS = 64
"""More rows are left to the library."""
_MAX_STRIPS = 1 << 14
_PARTIAL_FLOATS = 1 << 22


@dataclass(frozen=True)
class LinearWorkspace:
    """Where the parts of a strip meet. One for all products that run one after the other: a model's, say."""

    arrived: Tensor  # int32 [_MAX_STRIPS], zero between launches
    partial: Tensor  # float32 [_PARTIAL_FLOATS]

    @classmethod
    def allocate(cls, device: torch.device) -> LinearWorkspace:
        return cls(
            torch.zeros(_MAX_STRIPS, dtype=torch.int32, device=device),
            torch.empty(_PARTIAL_FLOATS, dtype=torch.float32, device=device),
        )


class Tiles(NamedTuple):
    """How a product is cut up."""

    outputs: int  # of a strip, a power of 2
    depth: int  # of a tile
    warps: int
    stages: int
    parts: int  # of a strip's depth
    prefetch: int  # 128-byte lines of each weight row that are asked for before the wait, a power of 2
    strips: int = 1  # that a program takes one after the other; more than 1 only with one part


@cache
def tiles_for(rows: int, outputs: int, columns: int, gated: bool) -> Tiles | None:
    """How to cut a product of `rows` rows, or None where the library is as fast. Measured on an H200.

    outputs: columns of the result, so half of the weight's rows if `gated`.
    """
    if rows <= 16:
        if gated:
            # Several strips a program only where most multiprocessors still have one.
            strips = 1 if outputs < 8192 else 2 if columns >= 4096 else 3
            return Tiles(32, 256, 4, 3, 1, 0, strips) if columns >= 4096 else Tiles(32, 256, 4, 4, 1, 8, strips)
        if columns >= 8192:
            # No part should have columns to mask: five for 8960, say.
            parts = 5 if columns % (5 * 256) == 0 and columns % (4 * 256) else 4
            return Tiles(16, 256, 2, 4, parts, 0) if outputs <= 2048 else Tiles(32, 512, 4, 4, 1, 8)
        if outputs <= 2048:
            return Tiles(16, 256, 2, 4, 4, 4)
        if outputs <= 8192:
            return Tiles(32, 256, 4, 7, 1, 8) if outputs <= 4096 else Tiles(32, 256, 2, 4, 1, 8)
    elif rows <= MAX_ROWS:
        if gated:
            if columns >= 4096:
                return Tiles(64, 128, 4, 4, 1, 0) if outputs >= 4096 else None
            # Small enough that the programs of all strips are there at once.
            return Tiles(32, 64, 4, 4, 1, 0) if outputs >= 8192 else None
        if outputs <= 2048:
            return Tiles(32, 256, 4, 4, 2, 8) if columns <= 2048 else None
        if 4096 <= outputs <= 8192:
            return Tiles(32, 128, 4, 8, 1, 8) if columns >= 8192 or outputs == 4096 else Tiles(64, 128, 4, 4, 1, 8)
    return None


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    workspace: LinearWorkspace,
    tiles: Tiles,
    *,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x [M, K] @ weight [N, K].T + bias [N], accumulated in float32 -> [M, N].

    gated: the first half of the columns is the gate, the result is silu(gate) * up, [M, N / 2]. residual [M, N]: the
    product is added to it in place, and it is returned. Raises ValueError for tiles with several parts and strips.
    """
    rows, columns = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    out = residual if residual is not None else torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    strips = -(-outputs // tiles.outputs)
    # 64 rows are the least that Hopper multiplies from shared memory; fewer, padded to 64, are faster than as they are.
    block_m = 16 if rows <= 16 else max(64, triton.next_power_of_2(rows))
    if tiles.strips > 1:
        if tiles.parts > 1:
            raise ValueError("a program takes several strips only where they are not cut into parts")
        _several_strips_kernel[(-(-strips // tiles.strips),)](
            x,
            weight,
            bias,
            out,
            rows,
            outputs,
            columns,
            x.stride(0),
            HAS_BIAS=bias is not None,
            GATED=gated,
            RESIDUAL=residual is not None,
            EVEN_K=columns % tiles.depth == 0,
            TILES=-(-columns // tiles.depth),
            BLOCK_M=block_m,
            BLOCK_N=tiles.outputs,
            BLOCK_K=tiles.depth,
            PREFETCH=tiles.prefetch,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **pdl_options(x),
        )
        return out
    _small_linear_kernel[(strips, tiles.parts)](
        x,
        weight,
        bias,
        out,
        workspace.partial,
        workspace.arrived,
        rows,
        outputs,
        columns,
        x.stride(0),
        HAS_BIAS=bias is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        EVEN_K=columns % (tiles.depth * tiles.parts) == 0,
        PARTS=tiles.parts,
        BLOCK_M=block_m,
        BLOCK_N=tiles.outputs,
        BLOCK_K=tiles.depth,
        PREFETCH=tiles.prefetch,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **pdl_options(x),
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _small_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,  # holds the residual, if there is one
    partial_ptr,
    arrived_ptr,
    rows,
    outputs,
    columns,
    x_stride,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    strip, part = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + m[:, None] * x_stride
    m_used = m < rows
    depth = tl.cdiv(tl.cdiv(columns, BLOCK_K), PARTS) * BLOCK_K
    begin = part * depth
    end = tl.minimum(begin + depth, columns)
    # Rows past the end are the first one: they are computed and thrown away.
    weight_row = weight_ptr + tl.where(n < outputs, n, 0).to(tl.int64)[:, None] * columns
    up_row = weight_row + outputs.to(tl.int64) * columns
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            _prefetch(weight_row, up_row, begin, end, GATED, PREFETCH)
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        acc, up = _add_tile(acc, up, x_row, m_used, weight_row, up_row, start + k, end, GATED, EVEN_K)

    if PARTS > 1:
        tile = m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        size: tl.constexpr = BLOCK_M * BLOCK_N * (2 if GATED else 1)
        base = partial_ptr + strip * PARTS * size
        tl.store(base + part * size + tile, acc)
        if GATED:
            tl.store(base + part * size + BLOCK_M * BLOCK_N + tile, up)
        tl.debug_barrier()  # every thread's stores come before the one thread's release
        if tl.atomic_add(arrived_ptr + strip, 1, sem="acq_rel") != PARTS - 1:
            return
        tl.store(arrived_ptr + strip, 0)  # for the next product
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for other in tl.static_range(PARTS):
            acc += tl.load(base + other * size + tile, cache_modifier=".cg")
            if GATED:
                up += tl.load(base + other * size + BLOCK_M * BLOCK_N + tile, cache_modifier=".cg")

    _write(acc, up, bias_ptr, out_ptr, m, n, rows, outputs, HAS_BIAS, GATED, RESIDUAL)


@triton.jit(do_not_specialize=["rows"])
def _several_strips_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,  # holds the residual, if there is one
    rows,
    outputs,
    columns,
    x_stride,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILES: tl.constexpr,  # of a strip
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    first, programs = tl.program_id(0), tl.num_programs(0)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + m[:, None] * x_stride
    m_used = m < rows
    up_offset = outputs.to(tl.int64) * columns
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            n = first * BLOCK_N + tl.arange(0, BLOCK_N)
            weight_row = weight_ptr + tl.where(n < outputs, n, 0).to(tl.int64)[:, None] * columns
            _prefetch(weight_row, weight_row + up_offset, 0, columns, GATED, PREFETCH)
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One loop over the tiles of all strips: with a loop a strip, the pipeline of loads would run dry at a strip's end.
    strips = tl.cdiv(tl.cdiv(outputs, BLOCK_N) - first, programs)
    for tile in range(strips * TILES):
        n = (first + tile // TILES * programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_row = weight_ptr + tl.where(n < outputs, n, 0).to(tl.int64)[:, None] * columns
        # Cleared here, not after writing, where it would be done while asynchronous products may still be under way.
        acc = tl.where(tile % TILES != 0, acc, 0.0)
        up = tl.where(tile % TILES != 0, up, 0.0)
        at = tile % TILES * BLOCK_K + k
        acc, up = _add_tile(acc, up, x_row, m_used, weight_row, weight_row + up_offset, at, columns, GATED, EVEN_K)
        if tile % TILES == TILES - 1:
            _write(acc, up, bias_ptr, out_ptr, m, n, rows, outputs, HAS_BIAS, GATED, RESIDUAL)


@triton.jit
def _prefetch(weight_row, up_row, begin, end, GATED: tl.constexpr, LINES: tl.constexpr):
    """Ask the level-2 cache for the first 128-byte lines, from column begin on, of a strip's weights."""
    line = begin + tl.arange(0, LINES)[None, :] * 64
    line = tl.where(line < end, line, 0)
    _prefetch_lines(weight_row + line)
    if GATED:
        _prefetch_lines(up_row + line)


@triton.jit
def _prefetch_lines(lines):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _add_tile(acc, up, x_row, m_used, weight_row, up_row, at, end, GATED: tl.constexpr, EVEN_K: tl.constexpr):
    """acc (and up) plus the products over the columns `at`, of which those from `end` on do not count."""
    if EVEN_K:
        x = tl.load(x_row + at[None, :], mask=m_used[:, None], other=0.0)
        acc = tl.dot(x, tl.load(weight_row + at[None, :]).T, acc)
        if GATED:
            up = tl.dot(x, tl.load(up_row + at[None, :]).T, up)
    else:
        used = at[None, :] < end
        x = tl.load(x_row + at[None, :], mask=m_used[:, None] & used, other=0.0)
        acc = tl.dot(x, tl.load(weight_row + at[None, :], mask=used, other=0.0).T, acc)
        if GATED:
            up = tl.dot(x, tl.load(up_row + at[None, :], mask=used, other=0.0).T, up)
    return acc, up


@triton.jit
def _write(
    acc,
    up,
    bias_ptr,
    out_ptr,
    m,
    n,
    rows,
    outputs,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Finish a strip: bias, activation, residual."""
    n_used = n < outputs
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_used, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptr + outputs + n, mask=n_used, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = acc * tl.sigmoid(acc) * up
    where = out_ptr + m[:, None] * outputs + n[None, :]
    used = (m < rows)[:, None] & n_used[None, :]
    if RESIDUAL:
        acc += tl.load(where, mask=used, other=0.0).to(tl.float32)
    tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=used)


def small_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool = False, residual: Tensor | None = None
) -> Tensor:
    """The same in plain PyTorch, in float32 up to the result; `residual` is not changed."""
    out = x.float() @ weight.float().T
    if bias is not None:
        out = out + bias.float()
    if gated:
        gate, up = out.chunk(2, -1)
        out = torch.nn.functional.silu(gate) * up
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype)
