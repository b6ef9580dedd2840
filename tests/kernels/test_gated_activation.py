"""Gated activations against textbook formulas in float64, on odd shapes and extreme gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from penstock.kernels import gated_activation as module
from penstock.kernels.gated_activation import (
    gelu_mul,
    gelu_mul_reference,
    gelu_mul_triton,
    silu_mul,
    silu_mul_reference,
    silu_mul_triton,
)
from penstock.kernels.launch import INTERPRETED
from tests.kernels.variants import variants

# The interpreter cuts bfloat16 off where hardware rounds it.
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [(1, 2), (3, 14), (17, 260), (2, 3, 10)]
ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "none": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def operation(gate_up: Tensor, activation: str, kernel: bool) -> Tensor:
    if activation == "silu":
        return silu_mul_triton(gate_up) if kernel else silu_mul(gate_up)
    approximate = "tanh" if activation == "tanh" else "none"
    return gelu_mul_triton(gate_up, approximate) if kernel else gelu_mul(gate_up, approximate)


VARIANTS = variants(partial(operation, kernel=False), partial(operation, kernel=True))


def by_hand(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.double().split(gate_up.shape[-1] // 2, -1)
    return gate.clone().apply_(ACTIVATIONS[activation]) * up


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("op", "device"), VARIANTS)
def test_equals_the_formula(
    op: Callable[..., Tensor],
    device: str,
    activation: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    torch.manual_seed(3)
    x = (2 * torch.randn(shape)).to(dtype)
    given = x.to(device, copy=True)
    out = op(given, activation)
    assert out.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(given.cpu(), x)
    torch.testing.assert_close(out.cpu().double(), by_hand(x, activation), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # as it should: x / infinity is 0
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("op", "device"), VARIANTS)
def test_extreme_gates(op: Callable[..., Tensor], device: str, activation: str) -> None:
    gates = torch.tensor([-1e4, -300.0, -100.0, -6.0, 0.0, 6.0, 100.0, 1e4])
    out = op(torch.cat((gates, torch.ones(8)))[None].to(device), activation).cpu()[0]
    expected = torch.tensor([0.0, 0.0, 0.0, ACTIVATIONS[activation](-6.0), 0.0, 6.0, 100.0, 1e4])
    expected[5] = ACTIVATIONS[activation](6.0)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("op", "device"), VARIANTS)
def test_the_gate_is_rounded_before_it_is_multiplied(op: Callable[..., Tensor], device: str, activation: str) -> None:
    torch.manual_seed(4)
    x = torch.randn(20, 66, dtype=torch.float16)
    out = op(x.to(device), activation).cpu()
    active = x[:, :33].double().apply_(ACTIVATIONS[activation]).half()
    expected = (active.double() * x[:, 33:].double()).half()
    # float32's error may tip a value that lies between two float16 numbers; without the rounding hundreds differ.
    assert (out != expected).sum() <= 5


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_rows_of_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_program_shape", lambda rows, n: (16, 1))
    torch.manual_seed(5)
    x = torch.randn(3, 74)
    torch.testing.assert_close(silu_mul_triton(x), silu_mul_reference(x), rtol=1e-5, atol=1e-6)
    gaps = torch.randn(3, 80)[:, :74]
    torch.testing.assert_close(silu_mul_triton(gaps), silu_mul_reference(gaps), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "n"), [(1, 14336), (64, 8960), (8192, 14336), (4099, 8960), (300, 4863)])
def test_models_shapes_on_a_gpu(tokens: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    x = torch.randn(tokens, 2 * n, device="cuda").to(dtype)
    tolerance = (
        1e-5 if dtype == torch.float32 else 1.6e-2
    )  # two bfloat16 steps: it is rounded twice, before the product and after
    torch.testing.assert_close(silu_mul(x), silu_mul_reference(x), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(gelu_mul(x, "tanh"), gelu_mul_reference(x, "tanh"), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(gelu_mul(x, "none"), gelu_mul_reference(x, "none"), rtol=tolerance, atol=1e-6)
