"""The gated activation of a SwiGLU MLP (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2n], the gate first -> silu(gate) * up, [..., n]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
