"""Rotary position embedding (Su et al. 2021), in the half-split form of Hugging Face checkpoints.

Dimension i and i + head_dim / 2 form a pair that is turned by position * frequency[i].
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_factors(
    positions: Tensor, frequencies: Tensor, amplitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `rotary` needs for tokens at `positions` [T]: two tensors [T, 1, head_dim], once a step for all layers.

    frequencies: float32 [head_dim / 2], or [T, head_dim / 2] where they depend on the position. The angles are float32.
    The sine carries the sign of its half, so that rotating is one multiplication and one multiply-add.
    """
    angles = positions.float()[:, None] * frequencies
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, head_dim], turned by the factors of `rotary_factors`."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return swapped.mul_(sin).addcmul_(x, cos)
