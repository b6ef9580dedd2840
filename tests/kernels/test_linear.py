"""Linear layers, packed and plain, against float64."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.linear import PackedLinear, PlainLinear, can_pack, make_linear


@pytest.mark.parametrize(("dtype", "tolerance"), {torch.float32: 1e-4, torch.bfloat16: 3e-2}.items())
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 1, 1), (1, 64, 31), (5, 33, 96), (16, 96, 64), (130, 48, 7)])
@pytest.mark.parametrize("kind", [PlainLinear, PackedLinear])
def test_equals_the_product(
    kind: type[PlainLinear] | type[PackedLinear],
    rows: int,
    inner: int,
    outer: int,
    has_bias: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    bias = torch.randn(outer).to(dtype) if has_bias else None
    if kind is PackedLinear and not can_pack(weight):
        pytest.skip("this processor's oneDNN does not compute in this type")
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    with torch.inference_mode():
        out = kind(weight, bias)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * inner**0.5)


def test_a_layer_without_adapters_refuses_one() -> None:
    layer = make_linear(torch.randn(4, 3), None)
    with pytest.raises(ValueError, match="no adapters"):
        layer(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))
