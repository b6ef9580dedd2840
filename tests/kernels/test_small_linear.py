"""Products with few rows against float32 PyTorch: odd shapes, and everything that is fused with them."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.small_linear import can_run, small_linear, small_linear_reference

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 32, 512), (1, 5, 1500), (3, 40, 300), (4, 7, 64)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", ["nothing", "norm", "gated", "residual", "norm gated", "norm residual"])
def test_equals_pytorch(device: str, rows: int, outputs: int, columns: int, bias: bool, fused: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float16  # the interpreter multiplies bfloat16 matrices wrongly: numpy has no such type
    weight_rows = outputs * 2 if "gated" in fused else outputs

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    wide = draw(rows, columns + 24)
    x = wide[:, 8 : columns + 8]  # a view of longer rows
    weight = draw(weight_rows, columns) / columns**0.5
    options = {
        "bias": draw(weight_rows) if bias else None,
        "norm": draw(columns) if "norm" in fused else None,
        "eps": 1e-5,
        "gated": "gated" in fused,
    }
    residual = draw(rows, outputs) if "residual" in fused else None
    expected = small_linear_reference(x, weight, residual=residual, **options)
    out = small_linear(x, weight, residual=residual, **options)
    assert residual is None or out is residual
    torch.testing.assert_close(out, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("outputs", "columns"), [(6144, 4096), (1536, 8960)])
def test_large_products_in_bfloat16(rows: int, outputs: int, columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(outputs, columns, device="cuda", dtype=torch.bfloat16) / columns**0.5
    error = (small_linear(x, weight).double() - x.double() @ weight.double().T).norm()
    assert error / (x.double() @ weight.double().T).norm() < 3e-3
    norm = torch.randn(columns, device="cuda", dtype=torch.bfloat16)
    expected = small_linear_reference(x, weight, norm=norm, eps=1e-5).double()
    assert (small_linear(x, weight, norm=norm, eps=1e-5).double() - expected).norm() / expected.norm() < 6e-3


def test_what_it_takes() -> None:
    assert can_run(torch.zeros(4, 8, dtype=torch.bfloat16))
    assert not can_run(torch.zeros(5, 8, dtype=torch.bfloat16))
    assert not can_run(torch.zeros(1, 8))
