"""Norms, rotation and storing against a loop over tokens and heads in float64; complex numbers rotate there."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import triton
from torch import Tensor

from penstock.kernels import rotary_store as module
from penstock.kernels.launch import INTERPRETED
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.rotary import rotary_factors, rotary_factors_triton
from penstock.kernels.rotary_store import Heads, rotary_store, rotary_store_reference, rotary_store_triton
from tests.kernels.variants import variants

VARIANTS = variants(rotary_store, rotary_store_triton)
# The interpreter cuts bfloat16 off where hardware rounds it, and the plain form rounds in between.
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
EPS = 1e-3


@dataclass(frozen=True)
class Shape:
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    page_size: int
    norm: bool


SHAPES = [
    Shape(1, 1, 1, 2, 1, False),
    Shape(1, 32, 8, 16, 16, False),
    Shape(5, 6, 2, 24, 4, True),
    Shape(7, 7, 1, 12, 3, False),
    Shape(3, 12, 2, 64, 16, True),
    Shape(4, 5, 5, 96, 2, True),
]


class Case:
    """Random projections and a pool in the engine's layout whose slots are NaN; tokens go into any slots."""

    def __init__(self, shape: Shape, dtype: torch.dtype, padding: int = 0) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype = shape, dtype
        total = shape.tokens + padding
        num_pages = total // shape.page_size + 3
        slots = random.Random(1).sample(range(num_pages * shape.page_size), shape.tokens)
        self.slots = slots + [-1] * padding
        self.qkv = torch.randn(total, (shape.heads + 2 * shape.kv_heads) * shape.dim).to(dtype)
        self.positions = torch.randint(0, 300, (total,))
        self.frequencies = 1.0 / 100 ** (torch.arange(shape.dim // 2) / shape.dim * 2)
        self.pool = torch.full((num_pages, shape.kv_heads, 3, 2, shape.page_size, shape.dim), torch.nan, dtype=dtype)
        self.norms = (torch.randn(2, shape.dim) + 1).to(dtype).unbind() if shape.norm else None

    def run(self, op: Callable[..., Tensor], device: str) -> tuple[Tensor, Tensor]:
        """The queries, and the pool with this step's keys and values in its layer 1."""
        shape, total = self.shape, len(self.slots)
        pool = self.pool.to(device, copy=True)
        batch = PagedBatch.build([1] * total, [1] * total, [[0]] * total, shape.page_size, device)
        batch = replace(batch, slots=torch.tensor(self.slots, device=device))
        positions, frequencies = self.positions.to(device), self.frequencies.to(device)
        if op is rotary_store_triton:
            factors = rotary_factors_triton(positions, frequencies, 1.25)
        else:
            factors = rotary_factors(positions, frequencies, 1.25, self.dtype)
        q_norm, k_norm = (norm.to(device) for norm in self.norms) if self.norms else (None, None)
        qkv = self.qkv.to(device, copy=True)
        out = op(
            qkv,
            factors,
            pool[:, :, 1, 0],
            pool[:, :, 1, 1],
            batch,
            Heads(shape.heads, shape.kv_heads, q_norm, k_norm, EPS),
        )
        assert torch.equal(qkv.cpu().view(torch.uint8), self.qkv.view(torch.uint8))
        assert out.dtype == self.dtype
        return out.cpu(), pool.cpu()

    def turned(self, first: int, count: int, norm: Tensor | None) -> Tensor:
        """Heads of the projection, normalised and rotated by hand: [T, count, dim] float64."""
        dim, rows = self.shape.dim, []
        angles = (self.positions.float()[:, None] * self.frequencies).double()
        for token, turn in enumerate(torch.polar(torch.full_like(angles, 1.25), angles)):
            for head in range(first, first + count):
                x = self.qkv[token, head * dim : (head + 1) * dim].double()
                if norm is not None:
                    x = x / (sum(value * value for value in x.tolist()) / dim + EPS) ** 0.5 * norm.double()
                pairs = torch.complex(x[: dim // 2], x[dim // 2 :]) * turn
                rows.append(torch.cat((pairs.real, pairs.imag)))
        return torch.stack(rows).view(-1, count, dim)

    def expected_queries(self) -> Tensor:
        return self.turned(0, self.shape.heads, self.norms[0] if self.norms else None)

    def expected_pool(self) -> Tensor:
        """Keys of layer 1 are float64's and need a tolerance; the rest is exact."""
        shape, pool = self.shape, self.pool.double()
        k = self.turned(shape.heads, shape.kv_heads, self.norms[1] if self.norms else None)
        v = self.qkv.view(len(self.slots), -1, shape.dim)[:, shape.heads + shape.kv_heads :]
        for token, slot in enumerate(self.slots):
            if slot >= 0:
                pool[slot // shape.page_size, :, 1, 0, slot % shape.page_size] = k[token]
                pool[slot // shape.page_size, :, 1, 1, slot % shape.page_size] = v[token].double()
        return pool


def check(pool: Tensor, expected: Tensor, tolerance: float) -> None:
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(pool[:, :, 1, 0].double(), expected[:, :, 1, 0], **close)
    torch.testing.assert_close(pool[:, :, 1, 1].double(), expected[:, :, 1, 1], rtol=0, atol=0, equal_nan=True)
    assert pool[:, :, 0].isnan().all()
    assert pool[:, :, 2].isnan().all()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "device"), VARIANTS)
def test_equals_the_plain_loop(
    op: Callable[..., Tensor], device: str, shape: Shape, dtype: torch.dtype, tolerance: float
) -> None:
    case = Case(shape, dtype)
    q, pool = case.run(op, device)
    torch.testing.assert_close(q.double(), case.expected_queries(), rtol=tolerance, atol=tolerance)
    check(pool, case.expected_pool(), tolerance)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES[2:4], ids=str)
@pytest.mark.parametrize(("op", "device"), VARIANTS[1:])
def test_padding_stores_nothing(
    op: Callable[..., Tensor], device: str, shape: Shape, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a token's heads are shared among programs."""
    q_block, kv_block = (triton.next_power_of_2(-(-heads // parts)) for heads in (shape.heads, shape.kv_heads))
    block = triton.next_power_of_2(shape.dim // 2)
    monkeypatch.setattr(module, "_program_shape", lambda *_: (parts, q_block, kv_block, block, 1))
    case = Case(shape, torch.float32, padding=3)
    case.qkv[-1] = torch.nan
    q, pool = case.run(op, device)
    assert q.is_contiguous()
    real = slice(0, shape.tokens)
    torch.testing.assert_close(q.double()[real], case.expected_queries()[real], rtol=1e-5, atol=1e-5)
    check(pool, case.expected_pool(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("op", "device"), VARIANTS)
def test_values_are_copied_bit_by_bit(op: Callable[..., Tensor], device: str, dtype: torch.dtype) -> None:
    shape = Shape(3, 2, 1, 8, 4, False)
    case = Case(shape, dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    anything = torch.iinfo(bits)
    case.qkv.view(bits)[:, 3 * 8 :] = torch.randint(anything.min, anything.max, (3, 8)).to(bits)
    case.qkv.view(bits)[0, 3 * 8 : 3 * 8 + 2] = torch.tensor([-1, 1])  # a NaN with a payload, the least subnormal
    _, pool = case.run(op, device)
    for token, slot in enumerate(case.slots):
        stored = pool[slot // 4, 0, 1, 1, slot % 4]
        assert torch.equal(stored.view(bits), case.qkv[token].view(bits)[3 * 8 :])


@pytest.mark.parametrize(("op", "device"), VARIANTS[1:])
def test_a_kernel_rounds_once(op: Callable[..., Tensor], device: str) -> None:
    """Only the normalised value is rounded on the way, as Hugging Face does before the norm's weight."""
    case = Case(Shape(9, 3, 2, 24, 4, True), torch.float16)
    q, _ = case.run(op, device)
    assert case.norms is not None
    x = case.qkv.view(9, 7, 24)[:, :3].double()
    normed = (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()).half().double() * case.norms[0].double()
    angles = (case.positions.float()[:, None, None] * case.frequencies).double()
    turned = torch.complex(normed[..., :12], normed[..., 12:]) * torch.polar(torch.full_like(angles, 1.25), angles)
    expected = torch.cat((turned.real, turned.imag), -1).half()
    # float32's error may tip a value that lies between two float16 numbers; rounding elsewhere tips dozens.
    assert (q != expected).sum() <= 4


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "half"),
    [(1, 32, 8, 64), (1, 1, 1, 1), (64, 12, 2, 64), (300, 40, 40, 48), (9999, 7, 1, 12)],
)
def test_every_head_has_a_program(tokens: int, heads: int, kv_heads: int, half: int) -> None:
    parts, q_block, kv_block, block, num_warps = module._program_shape(tokens, heads, kv_heads, half)
    assert tokens * parts <= max(1024, tokens)
    assert heads <= parts * q_block < 4 * heads
    assert kv_heads <= parts * kv_block
    assert half <= block < 2 * half
    for power in (q_block, kv_block, block, num_warps):
        assert power.bit_count() == 1


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_what_it_cannot_do_is_refused() -> None:
    batch = PagedBatch.build([1], [1], [[0]], 4, "cpu")
    qkv, pages = torch.zeros(1, 24), torch.zeros(2, 1, 4, 8)
    factors = rotary_factors_triton(batch.positions, torch.ones(4), 1.0)
    with pytest.raises(ValueError, match="both or not at all"):
        Heads(1, 1, q_norm=torch.ones(8))
    for k_pages, v_pages in ((pages, torch.zeros(2, 1, 8, 8)[:, :, :4]), (pages.mT, pages.mT)):
        with pytest.raises(ValueError, match="cannot store rows of strides"):
            rotary_store_triton(qkv, factors, k_pages, v_pages, batch, Heads(1, 1))


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 300, 8192])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (12, 2, 128), (14, 2, 64), (32, 32, 96)])
def test_models_shapes_on_a_gpu(heads: int, kv_heads: int, dim: int, tokens: int, norm: bool) -> None:
    """In float32 on a GPU against the plain form on CPU; float32 keeps both to one rounding."""
    case = Case(Shape(tokens, heads, kv_heads, dim, 16, norm), torch.float32)
    q, pool = case.run(rotary_store, "cuda")
    expected_q, expected_pool = case.run(rotary_store_reference, "cpu")
    torch.testing.assert_close(q, expected_q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool, expected_pool, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.gpu
@GPU
def test_pages_further_than_32_bits_reach() -> None:
    pool = torch.empty(3, 1 << 30, dtype=torch.float16, device="cuda")
    k_pages = pool.as_strided((3, 2, 4, 8), (1 << 30, 64, 8, 1))
    v_pages = pool.as_strided((3, 2, 4, 8), (1 << 30, 64, 8, 1), 32)
    batch = replace(PagedBatch.build([1], [1], [[0]], 4, "cuda"), slots=torch.tensor([11], device="cuda"))
    qkv = torch.randn(1, 40, device="cuda").half()
    factors = rotary_factors(torch.zeros(1, dtype=torch.int64, device="cuda"), torch.ones(4).cuda(), 1.0, torch.half)
    rotary_store(qkv, factors, k_pages, v_pages, batch, Heads(1, 2))
    assert torch.equal(k_pages[2, :, 3].flatten(), qkv[0, 8:24])
    assert torch.equal(v_pages[2, :, 3].flatten(), qkv[0, 24:])
