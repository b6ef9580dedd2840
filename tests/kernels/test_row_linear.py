"""Products of one row against float32 PyTorch: odd shapes, and what is done in their launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels import linear as linear_module
from penstock.kernels.attention_inputs import attention_inputs
from penstock.kernels.linear import CudaLinear
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.rms_norm import Normed, rms_norm_reference
from penstock.kernels.rotary import rotary_factors_triton
from penstock.kernels.rotary_store import Heads, rotary_store_triton
from penstock.kernels.row_linear import (
    RowProduct,
    RowTiles,
    row_linear,
    row_linear_reference,
    row_rotary_store,
    row_tiles_for,
)
from penstock.kernels.small_linear import LinearWorkspace, small_linear_reference

_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted")),
    pytest.param("cuda", marks=_GPU),
]
TOLERANCES = {torch.float16: 5e-3, torch.float32: 1e-5}
FUSED = [  # gated, added, bias, norm
    (False, False, False, False),
    (False, False, True, True),
    (False, True, True, False),
    (True, False, True, True),
    (True, False, False, False),
]


def draw(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("outputs", "columns", "tiles"),
    [
        *((1, 1, RowTiles(2, 1)), (7, 64, RowTiles(4, 4)), (9, 300, RowTiles(4, 1))),
        *((4, 1024, RowTiles(2, 2)), (3, 2100, RowTiles(1, 2))),
    ],
)
def test_equals_pytorch(device: str, dtype: torch.dtype, outputs: int, columns: int, tiles: RowTiles) -> None:
    torch.manual_seed(0)
    for gated, added, bias, norm in FUSED:
        rows = 2 * outputs if gated else outputs
        weight = draw(device, dtype, rows, columns) / columns**0.5
        one = RowProduct(
            draw(device, dtype, 1, columns + 9)[:, 9:],  # a view, not aligned
            weight,
            draw(device, dtype, rows) if bias else None,
            tiles,
            draw(device, dtype, columns) if norm else None,
            1e-2,
        )
        residual = draw(device, dtype, 1, outputs) if added else None
        expected = row_linear_reference(one, gated=gated, residual=residual)
        out = row_linear(one, gated=gated, residual=residual)
        assert out.shape == (1, outputs) and (residual is None or out is residual)
        torch.testing.assert_close(out, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_the_reference_norms_as_the_norm_does() -> None:
    """But for rounding in between, which a product's launch leaves out."""
    torch.manual_seed(0)
    x, weight, norm = torch.randn(1, 40), torch.randn(12, 40), torch.randn(40)
    one = RowProduct(x, weight, None, RowTiles(2, 1), norm, 1e-2)
    expected = small_linear_reference(rms_norm_reference(x, norm, 1e-2), weight, None)
    torch.testing.assert_close(row_linear_reference(one), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "outputs"), [(4, 2, 16, 2), (3, 1, 12, 8), (2, 2, 2, 4)])
@pytest.mark.parametrize("norm", [False, True])
def test_rotates_and_stores(device: str, heads: int, kv_heads: int, dim: int, outputs: int, norm: bool) -> None:
    """As the product and the launch after it do; the other slots keep what they have."""
    torch.manual_seed(0)
    columns, page_size = 48, 4
    weight = draw(device, torch.float32, (heads + 2 * kv_heads) * dim, columns)
    bias = draw(device, torch.float32, len(weight))
    scale = draw(device, torch.float32, columns) if norm else None
    one = RowProduct(draw(device, torch.float32, 1, columns), weight, bias, RowTiles(outputs, 2), scale, 1e-2)
    batch = PagedBatch.build([1], [10], [[0, 3, 1]], page_size, device)
    factors = rotary_factors_triton(batch.positions, torch.rand(dim // 2, device=device), 1.25)
    pools = [torch.full((5, kv_heads, 3, 2, page_size, dim), 7.0, device=device) for _ in range(2)]
    shape = Heads(heads, kv_heads)
    expected = rotary_store_triton(
        row_linear_reference(one), factors, pools[0][:, :, 1, 0], pools[0][:, :, 1, 1], batch, shape
    )
    pages = pools[1][:, :, 1, 0], pools[1][:, :, 1, 1]
    q = row_rotary_store(one, factors, *pages, batch.slots, shape)
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pools[1], pools[0], rtol=1e-5, atol=1e-5)
    assert int((pools[1] != 7.0).sum()) == 2 * kv_heads * dim

    before = pools[1].clone()
    nowhere = torch.full_like(batch.slots, -1)
    row_rotary_store(one, factors, *pages, nowhere, shape)
    assert torch.equal(pools[1], before), "padding stores nothing"
    with pytest.raises(ValueError, match="cannot store"):
        row_rotary_store(one, factors, pages[0], pages[1].mT, batch.slots, shape)


@pytest.mark.parametrize("device", DEVICES)
def test_layers_take_one_row_so(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: more rows, a residual that is yet to be added, depths beyond the registers go on as ever."""
    torch.manual_seed(0)
    launched: list[RowProduct] = []

    def noting(one: RowProduct, **named: object) -> Tensor:
        launched.append(one)
        return row_linear(one, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_module, "row_linear", noting)
    dtype, hidden = torch.float16, 64
    weight, norm = draw(device, dtype, 32, hidden) / 8, draw(device, dtype, hidden)
    layer = CudaLinear(weight, None, LinearWorkspace.allocate(weight.device))

    def check(found: Tensor, expected: Tensor, launches: int) -> None:
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        assert len(launched) == launches
        launched.clear()

    for rows, launches in ((1, 1), (2, 0)):
        x, residual = draw(device, dtype, rows, hidden), draw(device, dtype, rows, 32)
        normed = rms_norm_reference(x, norm, 1e-2)
        check(layer(x), small_linear_reference(x, weight, None), launches)
        check(layer(Normed(x, norm, 1e-2)), small_linear_reference(normed, weight, None), launches)
        gated = small_linear_reference(normed, weight, None, gated=True)
        check(layer.gated(Normed(x, norm, 1e-2)), gated, launches)
        expected = small_linear_reference(x, weight, None, residual=residual)
        left = layer.add_to(residual, x)
        check(residual if left is None else residual + left, expected, launches)

    delta = draw(device, dtype, 1, hidden)
    total = x[:1] + delta
    expected = small_linear_reference(rms_norm_reference(total, norm, 1e-2), weight, None)
    residual = x[:1].clone()
    check(layer(Normed(residual, norm, 1e-2, delta)), expected, 0)
    torch.testing.assert_close(residual, total)
    assert row_tiles_for(32, 1 << 16) is None


def test_heads_that_are_normalised_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys that are normalised go through the product and `rotary_store`, one row or not."""
    asked = []

    class Projection(CudaLinear):
        def row(self, x: Tensor | Normed, *, gated: bool = False, rotated: bool = False) -> RowProduct | None:
            asked.append(rotated)
            return None

    weight = torch.randn(8 * 4, 16)
    layer = Projection(weight, None, LinearWorkspace.allocate(weight.device))
    batch = PagedBatch.build([1], [1], [[0]], 4, "cpu")
    pool, ones = torch.zeros(2, 1, 2, 4, 8), torch.ones(8)
    cos, sin = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
    for norm, expected in ((ones, [False]), (None, [True, False])):
        attention_inputs(
            layer, torch.randn(1, 16), (cos, sin), pool[:, :, 0], pool[:, :, 1], batch,
            Heads(2, 1, norm, norm),
        )  # fmt: skip
        assert asked == expected
        asked.clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("outputs", "columns", "gated"),
    [
        *((2048, 1536, False), (1536, 1536, False), (8960, 1536, True), (1536, 8960, False), (151936, 1536, False)),
        *((6144, 4096, False), (4096, 4096, False), (14336, 4096, True), (4096, 14336, False), (128256, 4096, False)),
        *((8192, 8192, False), (8192, 28672, False), (28672, 8192, True), (4864, 896, True)),
    ],
)
def test_real_sizes(outputs: int, columns: int, gated: bool) -> None:
    torch.manual_seed(0)
    tiles = row_tiles_for(outputs, columns, gated=gated)
    assert tiles is not None
    with torch.device("cuda"):
        weight = torch.randn(outputs * (2 if gated else 1), columns, dtype=torch.bfloat16) / columns**0.5
        x, norm = torch.randn(1, columns, dtype=torch.bfloat16), torch.randn(columns, dtype=torch.bfloat16)
    for scale in (None, norm):
        one = RowProduct(x, weight, None, tiles, scale, 1e-5)
        expected = row_linear_reference(one, gated=gated)
        torch.testing.assert_close(row_linear(one, gated=gated), expected, rtol=2e-2, atol=2e-2)
