"""Root-mean-square normalisation (Zhang and Sennrich 2019), alone and joined with the residual addition before it.

Models call it on hidden states and, per head, on queries and keys. As in Hugging Face's models, a sum is normalised as
it is stored, and the normalised value is rounded to the tensor's type before the weight is applied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options, use_triton


@dataclass(frozen=True, slots=True)
class Normed:
    """A normalised residual that is yet to be computed: a product of one row does it on its way (row_linear.py)."""

    residual: Tensor  # [T, n]
    weight: Tensor  # [n]
    eps: float
    delta: Tensor | None = None  # what is to be added to the residual first, in place

    def tensor(self) -> Tensor:
        """It, computed. Once only: `delta` would be added again."""
        if self.delta is None:
            return rms_norm(self.residual, self.weight, self.eps)
        return add_rms_norm(self.delta, self.residual, self.weight, self.eps)


def as_tensor(x: Tensor | Normed) -> Tensor:
    """x, computed if it is yet to be."""
    return x.tensor() if isinstance(x, Normed) else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] / rms(x) * weight [n]. The mean is taken in float32 and rounded to x's type before the weight."""
    if use_triton(x):
        return rms_norm_triton(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place; returns the normalised sum."""
    if use_triton(x):
        return add_rms_norm_triton(x, residual, weight, eps)
    return rms_norm_reference(residual.add_(x), weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain PyTorch."""
    wide = x.float()
    scale: Tensor = torch.linalg.vecdot(wide, wide).unsqueeze(-1).mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of x [T, n] or [T, heads, n], whose first dimensions may have any strides.

    Raises:
        ValueError: x has another number of dimensions.
    """
    return _launch(x, None, weight, eps)


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`add_rms_norm` of x like `rms_norm_triton`'s and a contiguous residual of its shape.

    Raises:
        ValueError: x has another number of dimensions, or the residual another shape or gaps.
    """
    if residual.shape != x.shape or not residual.is_contiguous():
        raise ValueError(f"a residual for {tuple(x.shape)} must be contiguous and of that shape")
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    dims, n = x.ndim, x.shape[-1]
    if dims not in (2, 3):
        raise ValueError(f"rows are [T, n] or [T, heads, n], got {tuple(x.shape)}")
    if x.stride(-1) != 1:
        x = x.contiguous()
    heads = x.shape[1] if dims == 3 else 1
    rows = x.shape[0] * heads
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows_each, block, num_warps = _program_shape(rows, n)
    _rms_norm_kernel[(-(-rows // rows_each),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        rows,
        x.stride(0),
        x.stride(1) if dims == 3 else 0,
        eps,
        N=n,
        HEADS=heads,
        ROWS=rows_each,
        BLOCK=block,
        ADD=residual is not None,
        num_warps=num_warps,
        **pdl_options(x),
    )
    return out


def _program_shape(rows: int, n: int) -> tuple[int, int, int]:
    """Rows a program, row length as a power of two, warps.

    A thread holds 8 elements (one 16-byte access of a 2-byte type) where few rows make latency count, 16 where there
    are enough rows to fill the card: fewer warps then share a row's sum. Short rows are grouped once there are many.
    """
    block = 1 << (n - 1).bit_length()
    many = rows * block >= 1 << 21
    rows_each = max(1, 2048 // block) if many else 1
    num_warps = rows_each * block // (512 if many else 256)
    return rows_each, block, min(max(num_warps, 1), 16)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x,  # [rows / HEADS, HEADS, N]
    residual,  # [rows, N]; x itself without ADD
    weight,  # [N]
    out,  # [rows, N]
    rows,
    token_stride,
    head_stride,
    eps,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    inside = (row < rows) & (column < N)
    scale = tl.load(weight + column, column < N, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(x + row // HEADS * token_stride + row % HEADS * head_stride + column, inside, other=0.0)
    wide = value.to(tl.float32)
    if ADD:
        total = tl.load(residual + row * N + column, inside, other=0.0).to(tl.float32) + wide
        value = total.to(value.dtype)
        tl.store(residual + row * N + column, value, inside)
        wide = value.to(tl.float32)
    mean = tl.sum(wide * wide, 1, keep_dims=True) * (1.0 / N)
    normed = (wide * tl.rsqrt(mean + eps)).to(value.dtype).to(tl.float32)
    tl.store(out + row * N + column, (normed * scale).to(value.dtype), inside)
