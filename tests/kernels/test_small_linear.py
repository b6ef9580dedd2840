"""Products with few rows against float32 PyTorch: odd shapes, cut depths, and what is fused with them."""

from __future__ import annotations

import itertools

import pytest
import torch

from penstock.kernels import small_linear as module
from penstock.kernels.small_linear import LinearWorkspace, Tiles, small_linear, small_linear_reference, tiles_for

_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted")),
    pytest.param("cuda", marks=_GPU),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 32, 512), (3, 40, 300), (16, 7, 64), (20, 48, 130)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", ["nothing", "gated", "residual"])
@pytest.mark.parametrize(("parts", "strips"), [(1, 1), (3, 1), (1, 2)])
def test_equals_pytorch(
    device: str,
    rows: int,
    outputs: int,
    columns: int,
    bias: bool,
    fused: str,
    parts: int,
    strips: int,
) -> None:
    torch.manual_seed(0)
    dtype = torch.float16  # the interpreter multiplies bfloat16 matrices wrongly: numpy has no such type
    weight_rows = outputs * 2 if fused == "gated" else outputs

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    wide = draw(rows, columns + 24)
    x = wide[:, 8 : columns + 8]  # a view of longer rows
    weight = draw(weight_rows, columns) / columns**0.5
    offset = draw(weight_rows) if bias else None
    residual = draw(rows, outputs) if fused == "residual" else None
    expected = small_linear_reference(x, weight, offset, gated=fused == "gated", residual=residual)
    workspace = LinearWorkspace.allocate(x.device)
    tiles = Tiles(16, 64, 4, 2, parts, 4, strips)
    out = small_linear(x, weight, offset, workspace, tiles, gated=fused == "gated", residual=residual)
    assert residual is None or out is residual
    assert not workspace.arrived.any(), "the next product would count wrongly"
    torch.testing.assert_close(out, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strips", [2, 3, 5, 8])
def test_several_strips_a_program(device: str, strips: int) -> None:
    """Seven strips, the last one incomplete: programs that take fewer than others, and one that takes all."""
    torch.manual_seed(0)
    x = torch.randn(5, 300).to(device, torch.float16)
    weight = torch.randn(2 * 103, 300).to(device, torch.float16) / 300**0.5
    bias = torch.randn(2 * 103).to(device, torch.float16)
    workspace = LinearWorkspace.allocate(x.device)
    one = small_linear(x, weight, bias, workspace, Tiles(16, 128, 2, 3, 1, 2), gated=True)
    several = small_linear(x, weight, bias, workspace, Tiles(16, 128, 2, 3, 1, 2, strips), gated=True)
    assert torch.equal(several, one)  # the same sums in the same order
    expected = small_linear_reference(x, weight, bias, gated=True)
    torch.testing.assert_close(several, expected, rtol=5e-3, atol=5e-3)


def test_strips_in_parts_are_refused() -> None:
    x = torch.randn(1, 64)
    with pytest.raises(ValueError, match="parts"):
        small_linear(x, x, None, LinearWorkspace.allocate(x.device), Tiles(16, 16, 4, 2, 2, 0, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("tiles", [Tiles(16, 512, 2, 3, 1, 0, 7), Tiles(32, 128, 4, 4, 1, 8, 3)])
def test_several_strips_in_bfloat16(rows: int, tiles: Tiles) -> None:
    torch.manual_seed(0)
    workspace = LinearWorkspace.allocate(torch.device("cuda"))
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16) / 64
    residual = torch.randn(rows, 8192, device="cuda", dtype=torch.bfloat16)
    product = x.double() @ weight.double().T
    gate, up = product.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    gated = small_linear(x, weight, None, workspace, tiles, gated=True)
    assert (gated.double() - expected).norm() / expected.norm() < 3e-3
    expected = product + residual.double()
    added = small_linear(x, weight, None, workspace, tiles, residual=residual)
    assert (added.double() - expected).norm() / expected.norm() < 3e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 8, 17, 64])
@pytest.mark.parametrize(
    ("outputs", "columns"), [(6144, 4096), (4096, 14336), (1536, 8960), (1536, 1536), (2048, 1536), (28672, 4096)]
)
def test_large_products_in_bfloat16(rows: int, outputs: int, columns: int) -> None:
    torch.manual_seed(0)
    workspace = LinearWorkspace.allocate(torch.device("cuda"))
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(outputs, columns, device="cuda", dtype=torch.bfloat16) / columns**0.5
    expected = x.double() @ weight.double().T
    for _ in range(3):
        out = small_linear(
            x, weight, None, workspace, tiles_for(rows, outputs, columns, False) or Tiles(64, 128, 4, 3, 2, 4)
        )
        assert (out.double() - expected).norm() / expected.norm() < 3e-3
        tiles = tiles_for(rows, outputs // 2, columns, True) or Tiles(32, 128, 4, 3, 1, 4)
        gated = small_linear(x, weight, None, workspace, tiles, gated=True)
        gate, up = expected.chunk(2, -1)
        reference = torch.nn.functional.silu(gate) * up
        assert (gated.double() - reference).norm() / reference.norm() < 3e-3


@pytest.mark.parametrize("rows", [1, 4, 16, 17, 40, 64])
def test_parts_fit_the_workspace(rows: int) -> None:
    found = 0
    for outputs in (512, 1536, 2048, 4096, 8192, 14336, 28672, 152064):
        for columns, gated in itertools.product((1536, 4096, 8960, 14336), (False, True)):
            tiles = tiles_for(rows, outputs, columns, gated)
            if tiles is None:
                continue
            found += 1
            strips = -(-outputs // tiles.outputs)
            floats = strips * tiles.parts * tiles.outputs * max(16, 1 << (rows - 1).bit_length()) * (1 + gated)
            assert tiles.parts == 1 or tiles.strips == 1
            assert tiles.parts == 1 or (strips <= module._MAX_STRIPS and floats <= module._PARTIAL_FLOATS)
    assert found


def test_many_rows_are_left_to_the_library() -> None:
    assert tiles_for(module.MAX_ROWS + 1, 4096, 14336, False) is None


def test_several_strips_leave_no_card_half_empty() -> None:
    several = 0
    for rows, outputs, columns, gated in itertools.product(
        (1, 16, 40, 64), range(1024, 30000, 1024), (896, 1536, 4096, 8192), (False, True)
    ):
        tiles = tiles_for(rows, outputs, columns, gated)
        if tiles is not None and tiles.strips > 1:
            several += 1
            assert -(-outputs // tiles.outputs) // tiles.strips >= 80  # programs; an H200 has 132 multiprocessors
    assert several
