"""Rotary position embedding (Su et al. 2021), in the half-split form of Hugging Face checkpoints.

Dimension i and i + head_dim / 2 form a pair that is turned by position * frequency[i]. A model makes the factors of a
step once, with `rotary_factors`, and hands them to `rotary_store` in every layer. They differ in form: the plain
operations want both halves of a head spelled out, the kernel wants each number once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options, use_triton


def rotary_factors(
    positions: Tensor, frequencies: Tensor, amplitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for tokens at `positions` [T], once a step for all layers; what `rotary_store` reads.

    frequencies: float32 [head_dim / 2], or [T, head_dim / 2] where they depend on the position. The angles are float32.
    On CUDA the factors are those of `rotary_factors_triton`, else those of `rotary_factors_reference` in `dtype`.
    """
    if use_triton(positions):
        return rotary_factors_triton(positions, frequencies, amplitude)
    return rotary_factors_reference(positions, frequencies, amplitude, dtype)


def rotary_factors_reference(
    positions: Tensor, frequencies: Tensor, amplitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Two tensors [T, 1, head_dim], for `rotary`.

    The sine carries the sign of its half, so that rotating is one multiplication and one multiply-add.
    """
    angles = positions.float()[:, None] * frequencies
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def rotary_factors_triton(positions: Tensor, frequencies: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """Two contiguous float32 tensors [T, head_dim / 2]: amplitude * cos(angle) and amplitude * sin(angle)."""
    tokens, half = positions.shape[0], frequencies.shape[-1]
    factors = positions.new_empty((2, tokens, half), dtype=torch.float32)
    cos, sin = factors[0], factors[1]
    block = 1 << (half - 1).bit_length()
    rows = max(1, 256 // block)
    _rotary_factors_kernel[(-(-tokens // rows),)](
        positions,
        frequencies,
        cos,
        sin,
        tokens,
        frequencies.stride(0) if frequencies.ndim == 2 else 0,
        amplitude,
        HALF=half,
        BLOCK=block,
        ROWS=rows,
        num_warps=2,
        **pdl_options(positions),
    )
    return cos, sin


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, head_dim], turned by the factors of `rotary_factors_reference`."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return swapped.mul_(sin).addcmul_(x, cos)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["positions"])
def _rotary_factors_kernel(
    positions,  # [T]
    frequencies,  # [HALF], or [T, HALF]
    cos,  # [T, HALF]
    sin,  # [T, HALF]
    tokens,
    token_stride,  # of frequencies
    amplitude,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)[None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (row < tokens) & (column < HALF)
    position = tl.load(positions + row, row < tokens, other=0).to(tl.float32)
    angle = position * tl.load(frequencies + row.to(tl.int64) * token_stride + column, inside, other=0.0)
    # tl.sin and tl.cos are libdevice's, which reduce large angles exactly; the hardware's sin.approx does not.
    index = row.to(tl.int64) * HALF + column
    tl.store(cos + index, tl.cos(angle) * amplitude, inside)
    tl.store(sin + index, tl.sin(angle) * amplitude, inside)
