"""Root-mean-square normalisation (Zhang and Sennrich 2019), alone and joined with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., n] / rms(x) * weight [n]. The mean is taken in float32 and rounded to x's type before the weight."""
    wide = x.float()
    scale: Tensor = torch.linalg.vecdot(wide, wide).unsqueeze(-1).mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place; returns the normalised sum."""
    return rms_norm(residual.add_(x), weight, eps)
