"""RMSNorm against the textbook formula in float64, on odd shapes and strided views."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from penstock.kernels import rms_norm as module
from penstock.kernels.launch import INTERPRETED
from penstock.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_triton,
    rms_norm,
    rms_norm_reference,
    rms_norm_triton,
)
from tests.kernels.variants import variants

# The interpreter cuts bfloat16 off where hardware rounds it.
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [(1, 1), (1, 7), (3, 64), (17, 130), (2, 5, 24)]
Op = Callable[..., Tensor]


def norm_by_hand(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.double().reshape(-1, x.shape[-1])
    done = [row / math.sqrt(sum(value * value for value in row.tolist()) / len(row) + eps) for row in rows]
    return torch.stack(done).view(x.shape) * weight.double()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("op", "device"), variants(rms_norm, rms_norm_triton))
def test_rms_norm(op: Op, device: str, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    given = x.to(device, copy=True)
    out = op(given, weight.to(device), 1e-2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu().double(), norm_by_hand(x, weight, 1e-2), rtol=tolerance, atol=tolerance)
    assert torch.equal(given.cpu(), x)


@pytest.mark.parametrize(("op", "device"), variants(rms_norm, rms_norm_triton))
def test_rows_may_be_a_strided_view(op: Op, device: str) -> None:
    torch.manual_seed(1)
    wide, weight = torch.randn(5, 9, 24), torch.randn(24)
    for view in (slice(0, 6), slice(6, 7)):
        out = op(wide.to(device)[:, view], weight.to(device), 1e-6)
        torch.testing.assert_close(out.cpu().double(), norm_by_hand(wide[:, view], weight, 1e-6), rtol=1e-5, atol=1e-5)
    out = op(wide.to(device).transpose(1, 2), torch.ones(9, device=device), 1e-6)  # not even rows are contiguous
    expected = norm_by_hand(wide.transpose(1, 2).contiguous(), torch.ones(9), 1e-6)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("op", "device"), variants(add_rms_norm, add_rms_norm_triton))
def test_add_rms_norm_adds_in_place(
    op: Op, device: str, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(2)
    wide, weight = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    x, residual = wide[..., : shape[-1]], torch.randn(shape).to(dtype)
    updated = residual.to(device, copy=True)
    out = op(wide.to(device)[..., : shape[-1]], updated, weight.to(device), 1e-5)
    total = updated.cpu()
    if dtype != torch.bfloat16:
        assert torch.equal(total, residual + x)
    torch.testing.assert_close(total, residual + x, rtol=1e-2, atol=0)
    torch.testing.assert_close(out.cpu().double(), norm_by_hand(total, weight, 1e-5), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("op", "device"), variants(add_rms_norm, add_rms_norm_triton))
def test_values_are_rounded_where_hugging_face_rounds_them(op: Op, device: str) -> None:
    """The sum before it is normalised, the normalised value before its weight."""
    torch.manual_seed(3)
    x, residual, weight = (torch.randn(40, 33, dtype=torch.float16) for _ in range(3))
    out = op(x.to(device), residual.to(device, copy=True), weight[0].to(device), 1e-5).cpu()
    total = (residual.double() + x.double()).half().double()
    normed = (total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt()).half()
    expected = (normed.double() * weight[0].double()).half()
    # float32's error may tip a value that lies between two float16 numbers; another order of rounding tips hundreds.
    assert (out != expected).sum() <= 5


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_programs_of_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_program_shape", lambda rows, n: (4, 32, 1))
    torch.manual_seed(4)
    x, weight = torch.randn(3, 9, 24)[:, :7], torch.randn(24)
    expected = norm_by_hand(x, weight, 1e-6)
    torch.testing.assert_close(rms_norm_triton(x, weight, 1e-6).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 4096), (256, 1536), (8192, 4096), (1 << 20, 24), (7, 1 << 16)])
def test_a_program_holds_whole_rows(rows: int, n: int) -> None:
    rows_each, block, num_warps = module._program_shape(rows, n)
    assert n <= block < 2 * n
    assert 1 <= num_warps <= 16
    for power in (rows_each, block, num_warps):
        assert power.bit_count() == 1


def test_impossible_shapes_are_refused() -> None:
    weight = torch.ones(4)
    with pytest.raises(ValueError, match=r"\[T, n\] or \[T, heads, n\], got \(4,\)"):
        rms_norm_triton(torch.ones(4), weight, 1e-5)
    with pytest.raises(ValueError, match=r"a residual for \(2, 4\)"):
        add_rms_norm_triton(torch.ones(2, 4), torch.ones(2, 8)[:, :4], weight, 1e-5)
    with pytest.raises(ValueError, match=r"a residual for \(2, 4\)"):
        add_rms_norm_triton(torch.ones(2, 4), torch.ones(1, 4), weight, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4096), (256, 1536), (8192, 4096), (5000, 1537), (4099, 32, 64), (8192, 8, 128)])
def test_models_shapes_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    x, residual = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device="cuda").to(dtype)
    total = residual + x
    out = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    tolerance = (
        1e-5 if dtype == torch.float32 else 1.6e-2
    )  # two bfloat16 steps: it is rounded twice, before the weight and after
    expected = rms_norm_reference(total, weight, 1e-5)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(rms_norm(total, weight, 1e-5), expected, rtol=tolerance, atol=1e-5)
