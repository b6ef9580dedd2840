"""Rotation and its factors against complex numbers in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from penstock.kernels.rotary import rotary, rotary_factors, rotary_factors_reference, rotary_factors_triton
from tests.kernels.variants import variants


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


def once(positions: Tensor, frequencies: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """The factors of the plain form, without what it spells out for `rotary`."""
    if positions.is_cuda:
        return rotary_factors(positions, frequencies, amplitude, torch.float32)
    cos, sin = rotary_factors_reference(positions, frequencies, amplitude, torch.float32)
    half = frequencies.shape[-1]
    assert torch.equal(cos[:, 0, :half], cos[:, 0, half:])
    assert torch.equal(-sin[:, 0, :half], sin[:, 0, half:])
    return cos[:, 0, :half], sin[:, 0, half:]


Factors = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


@pytest.mark.parametrize("half", [1, 12, 48, 64])
@pytest.mark.parametrize(("op", "device"), variants(once, rotary_factors_triton))
def test_factors_of_positions_near_and_far(op: Factors, device: str, half: int) -> None:
    """Angles of a million radians need an exact reduction: a fast one is wrong in the first digit."""
    positions = torch.tensor([0, 1, 2, 17, 4095, 131071, 999_983, 1_000_000, 16_777_216])
    frequencies = 1.0 / 10000 ** (torch.arange(half) / half)
    cos, sin = op(positions.to(device), frequencies.to(device), 0.75)
    assert cos.shape == sin.shape == (9, half)
    assert cos.dtype == sin.dtype == torch.float32
    angles = (positions.float()[:, None] * frequencies).double()
    torch.testing.assert_close(cos.cpu().double(), 0.75 * angles.cos(), rtol=0, atol=2e-7)
    torch.testing.assert_close(sin.cpu().double(), 0.75 * angles.sin(), rtol=0, atol=2e-7)


@pytest.mark.parametrize(("op", "device"), variants(once, rotary_factors_triton))
def test_a_frequency_for_each_token(op: Factors, device: str) -> None:
    torch.manual_seed(3)
    positions, frequencies = torch.arange(40), torch.rand(40, 5)
    frequencies[3] = 0.25
    cos, sin = op(positions.to(device), frequencies.to(device), 1.0)
    torch.testing.assert_close(cos[3].cpu(), torch.full((5,), math.cos(0.75)))
    angles = (positions.float()[:, None] * frequencies).double()
    torch.testing.assert_close(cos.cpu().double(), angles.cos(), rtol=0, atol=3e-7)
    torch.testing.assert_close(sin.cpu().double(), angles.sin(), rtol=0, atol=3e-7)
