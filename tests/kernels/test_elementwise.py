"""Normalisation, rotation and activation against textbook formulas in float64, on odd shapes and strided views."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from penstock.kernels.gated_activation import silu_mul
from penstock.kernels.rms_norm import add_rms_norm, rms_norm
from penstock.kernels.rotary import rotary, rotary_factors

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(1, 1), (1, 7), (3, 64), (17, 130), (2, 5, 24)]


def norm_by_hand(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.double().reshape(-1, x.shape[-1])
    done = [row / math.sqrt(sum(value * value for value in row.tolist()) / len(row) + eps) for row in rows]
    return torch.stack(done).view(x.shape) * weight.double()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    before = x.clone()
    expected = norm_by_hand(x, weight, 1e-2)
    torch.testing.assert_close(rms_norm(x, weight, 1e-2).double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_adds_in_place(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    total = residual + x
    out = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    torch.testing.assert_close(out.double(), norm_by_hand(total, weight, 1e-5), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), {torch.float32: 1e-4, torch.bfloat16: 5e-2}.items())
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (5, 3, 24), (9, 2, 64)])
def test_rotary(tokens: int, heads: int, dim: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(2)
    x = torch.randn(tokens, heads + 1, dim).to(dtype)[:, :heads]  # a view, as of a joined projection
    positions = torch.randint(0, 500, (tokens,))
    frequencies = 1.0 / 100 ** (torch.arange(dim // 2) / dim * 2)
    cos, sin = rotary_factors(positions, frequencies, 1.5, dtype)
    pairs = torch.complex(x[..., : dim // 2].double(), x[..., dim // 2 :].double())
    angles = positions.double()[:, None] * frequencies.double()
    turned = pairs * torch.polar(torch.full_like(angles, 1.5), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotary(x, cos, sin).double(), expected, rtol=tolerance, atol=tolerance)


def test_rotary_takes_a_frequency_for_each_token() -> None:
    frequencies = torch.tensor([[0.5], [0.25]])
    cos, sin = rotary_factors(torch.tensor([2, 4]), frequencies, 1.0, torch.float32)
    torch.testing.assert_close(cos[:, 0, 0], torch.tensor([math.cos(1.0)] * 2))
    torch.testing.assert_close(sin[:, 0], torch.tensor([[-math.sin(1.0), math.sin(1.0)]] * 2))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (17, 260)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(3)
    x = torch.randn(shape).to(dtype)
    gate, up = x.double().split(shape[-1] // 2, -1)
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(silu_mul(x).double(), expected, rtol=tolerance, atol=tolerance)
