"""Matrix products with one to four rows, for decode: every weight is read once, so only memory and launches count.

One program computes a strip of outputs by multiply-add, with no matrix unit: sixteen rows of padding would cost more
than the weights. What stands around a product in a decoder is done in the same launch: the RMSNorm before it (the scale
of a row can be applied after the product), the gated activation or the residual addition after it. While the kernel
ahead still runs, a program already asks for its weights (see `launch.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options

MAX_ROWS = 4
"""More rows are left to the library (benchmarks/kernels.py)."""


def can_run(x: Tensor) -> bool:
    """Whether `small_linear` takes x: half precision, few rows."""
    return x.shape[0] <= MAX_ROWS and x.dtype in (torch.bfloat16, torch.float16)


def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x [M, K] @ weight [N, K].T + bias [N], accumulated in float32 -> [M, N].

    norm: RMSNorm weight [K]; x is normalised first. gated: the first half of the columns is the gate, the result is
    silu(gate) * up, [M, N / 2]. residual [M, N]: the product is added to it in place, and it is returned.
    """
    rows, columns = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    out = residual if residual is not None else torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    block_m = triton.next_power_of_2(rows)
    block_n, block_k, warps, stages, prefetch = _tiles(block_m, outputs, columns, gated)
    _small_linear_kernel[(triton.cdiv(outputs, block_n),)](
        x,
        weight,
        bias,
        norm,
        out,
        eps,
        rows,
        outputs,
        columns,
        x.stride(0),
        HAS_BIAS=bias is not None,
        NORM=norm is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        EVEN_K=columns % block_k == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAGES=stages,
        PREFETCH=prefetch,
        num_warps=warps,
        **pdl_options(x),
    )
    return out


def _tiles(rows: int, outputs: int, columns: int, gated: bool) -> tuple[int, int, int, int, int]:
    """Outputs and depth of a tile, warps, stages, and 128-byte lines of a weight row to ask for before the wait."""
    return 8, 512, 4, 3, 16


@triton.jit
def _small_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    out_ptr,  # holds the residual, if there is one
    eps,
    rows,
    outputs,
    columns,
    x_stride,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_used = m < rows
    n_used = n < outputs
    # Rows past the end are the first one: they are computed and thrown away.
    weight_row = weight_ptr + tl.where(n_used, n, 0).to(tl.int64)[:, None] * columns
    up_row = weight_row + outputs.to(tl.int64) * columns
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0:
            line = tl.arange(0, PREFETCH)[None, :] * 64
            line = tl.where(line < columns, line, 0)
            _prefetch(weight_row + line)
            if GATED:
                _prefetch(up_row + line)
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in tl.range(0, columns, BLOCK_K, num_stages=STAGES):
        at = start + k
        at_used = at < columns if not EVEN_K else k >= 0
        x = tl.load(x_ptr + m[:, None] * x_stride + at[None, :], mask=m_used[:, None] & at_used[None, :], other=0.0)
        x = x.to(tl.float32)
        if NORM:
            squares += x * x
            x = x * tl.load(norm_ptr + at, mask=at_used, other=0.0).to(tl.float32)[None, :]
        weight = (
            tl.load(weight_row + at[None, :]) if EVEN_K else tl.load(weight_row + at, mask=at_used[None, :], other=0.0)
        )
        acc += x[:, None, :] * weight.to(tl.float32)[None, :, :]
        if GATED:
            weight = tl.load(up_row + at[None, :]) if EVEN_K else tl.load(up_row + at, mask=at_used[None, :], other=0.0)
            up += x[:, None, :] * weight.to(tl.float32)[None, :, :]
    result = tl.sum(acc, 2)
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 1) / columns + eps)
    result = result * scale[:, None]
    if HAS_BIAS:
        result += tl.load(bias_ptr + n, mask=n_used, other=0.0).to(tl.float32)[None, :]
    if GATED:
        other = tl.sum(up, 2) * scale[:, None]
        if HAS_BIAS:
            other += tl.load(bias_ptr + outputs + n, mask=n_used, other=0.0).to(tl.float32)[None, :]
        result = result * tl.sigmoid(result) * other
    where = out_ptr + m[:, None] * outputs + n[None, :]
    used = m_used[:, None] & n_used[None, :]
    if RESIDUAL:
        result += tl.load(where, mask=used, other=0.0).to(tl.float32)
    tl.store(where, result.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit
def _prefetch(lines):
    """Ask the level-2 cache for the 128-byte lines at these addresses."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


def small_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, in float32 up to the result; `residual` is not changed."""
    wide = x.float()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * norm.float()
    out = wide @ weight.float().T
    if bias is not None:
        out = out + bias.float()
    if gated:
        gate, up = out.chunk(2, -1)
        out = torch.nn.functional.silu(gate) * up
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype)
