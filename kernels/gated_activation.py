"""The gated activations of MLPs (Shazeer 2020): an activation of the gate, times the other half.

The gate is activated in float32 and rounded to the tensor's type before it is multiplied, as Hugging Face's models do.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options, use_triton


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2n], the gate first -> silu(gate) * up, [..., n]."""
    return silu_mul_triton(gate_up) if use_triton(gate_up) else silu_mul_reference(gate_up)


def gelu_mul(gate_up: Tensor, approximate: Literal["none", "tanh"]) -> Tensor:
    """gate_up [..., 2n], the gate first -> gelu(gate) * up, [..., n]; "tanh" is the approximation of that name."""
    if use_triton(gate_up):
        return gelu_mul_triton(gate_up, approximate)
    return gelu_mul_reference(gate_up, approximate)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_mul` in plain PyTorch."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gelu_mul_reference(gate_up: Tensor, approximate: Literal["none", "tanh"]) -> Tensor:
    """`gelu_mul` in plain PyTorch."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate=approximate).mul_(up)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """`silu_mul` in one launch."""
    return _launch(gate_up, "silu")


def gelu_mul_triton(gate_up: Tensor, approximate: Literal["none", "tanh"]) -> Tensor:
    """`gelu_mul` in one launch."""
    return _launch(gate_up, "gelu_tanh" if approximate == "tanh" else "gelu")


def _launch(gate_up: Tensor, activation: Literal["silu", "gelu", "gelu_tanh"]) -> Tensor:
    if not gate_up.is_contiguous():
        gate_up = gate_up.contiguous()
    *leading, double = gate_up.shape
    n = double // 2
    rows = gate_up.numel() // double
    out = gate_up.new_empty((*leading, n))
    block, num_warps = _program_shape(rows, n)
    pieces = -(-n // block)
    _gated_kernel[(rows * pieces,)](
        gate_up,
        out,
        N=n,
        PIECES=pieces,
        BLOCK=block,
        ACTIVATION=activation,
        num_warps=num_warps,
        **pdl_options(gate_up),
    )
    return out


def _program_shape(rows: int, n: int) -> tuple[int, int]:
    """Elements of a row a program, and its warps.

    A few decode rows are cut small to reach all multiprocessors, with one 16-byte access a thread and half; many rows
    in large pieces, two accesses a thread, so that starting programs does not take longer than moving their bytes.
    """
    block, each = (512, 8) if rows * n <= 1 << 20 else (2048, 16)
    block = min(block, 1 << (n - 1).bit_length())
    return block, max(1, block // (32 * each))


@triton.jit
def _gated_kernel(
    gate_up,  # [rows, 2 * N]
    out,  # [rows, N]
    N: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // PIECES).to(tl.int64)
    column = program % PIECES * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(gate_up + row * (2 * N) + column, inside, other=0.0)
    up = tl.load(gate_up + row * (2 * N) + N + column, inside, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    if ACTIVATION == "silu":
        active = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        active = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)), which does not cancel where the gate is far below zero.
        active = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    tl.store(out + row * N + column, (active.to(gate.dtype).to(tl.float32) * up).to(gate.dtype), inside)
