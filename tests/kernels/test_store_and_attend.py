"""One launch against two, bit by bit, and against the plain form; what is stored, and what goes which way."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.kernels import decode_attention, launch
from penstock.kernels import store_and_attend as module
from penstock.kernels.launch import INTERPRETED
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.rotary import rotary_factors
from penstock.kernels.store_and_attend import store_and_attend

_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
_CPU = [pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")]
CPU = pytest.param("cpu", marks=_CPU)
DEVICES = [CPU, pytest.param("cuda", marks=_GPU)]


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    page_size: int
    norm: bool = False
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32


class Case:
    """Decoding sequences in a pool of the engine's layout, whose slots are NaN where nothing was stored yet.

    Contexts hold the new token. Those of 0 are padding, as a captured step has it.
    """

    def __init__(self, shape: Shape, contexts: list[int]) -> None:
        torch.manual_seed(0)
        self.shape, size = shape, shape.page_size
        counts = [-(-context // size) for context in contexts]
        ids = random.Random(1).sample(range(sum(counts) + 3), sum(counts))
        tables = [[ids.pop() for _ in range(count)] for count in counts]
        pool = torch.full((sum(counts) + 3, shape.kv_heads, 3, 2, size, shape.dim), torch.nan)
        for context, table in zip(contexts, tables, strict=True):
            for position in range(context - 1):
                pool[table[position // size], :, 1, :, position % size] = torch.randn(shape.kv_heads, 2, shape.dim)
        self.pool = pool.to(shape.dtype)
        real = [max(context, 1) for context in contexts]
        self.batch = PagedBatch.build([1] * len(real), real, [table or [0] for table in tables], size, "cpu")
        padding = torch.tensor(contexts) == 0
        self.slots = self.batch.slots.masked_fill(padding, -1)
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        width = (shape.heads + 2 * shape.kv_heads) * shape.dim
        self.qkv = torch.randn(len(real), width + 16).to(shape.dtype)[:, :width]
        self.qkv[padding] = torch.nan
        self.norms = (torch.randn(2, shape.dim) + 1).to(shape.dtype).unbind() if shape.norm else (None, None)

    def run(self, device: str) -> tuple[Tensor, Tensor]:
        """Attention's output, zero where it means nothing, and the pool afterwards."""
        shape, pool, batch = self.shape, self.pool.to(device, copy=True), self.batch
        batch = replace(
            batch,
            page_tables=batch.page_tables.to(device),
            table_rows=batch.table_rows.to(device),
            contexts=self.contexts.to(device),
            positions=batch.positions.to(device),
            slots=self.slots.to(device),
        )
        frequencies = 1.0 / 100 ** (torch.arange(shape.dim // 2, device=device) / shape.dim * 2)
        factors = rotary_factors(batch.positions, frequencies, 1.25, shape.dtype)
        q_norm, k_norm = (None if norm is None else norm.to(device) for norm in self.norms)
        extra: dict[str, Any] = {}
        if shape.soft_cap is not None or shape.sinks:
            sinks = torch.linspace(-1, 2, shape.heads, device=device) if shape.sinks else None
            extra = {"soft_cap": shape.soft_cap, "sinks": sinks}
        out = store_and_attend(
            self.qkv.to(device),
            factors,
            pool[:, :, 1, 0],
            pool[:, :, 1, 1],
            batch,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=1e-3,
            scale=0.3,
            sliding_window=shape.window,
            **extra,
        )
        assert out.shape == (len(self.contexts), shape.heads, shape.dim) and out.dtype == shape.dtype
        if "decode" in batch.plans:
            assert not batch.plans["decode"].arrived.any(), "the next layer would count wrongly"
        out[batch.contexts == 0] = 0.0
        return out.cpu(), pool.cpu()

    def in_two_launches(self, device: str) -> tuple[Tensor, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_MOST_SEQUENCES", 0)
            return self.run(device)

    def in_plain_form(self) -> tuple[Tensor, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "interpret_ops", False)
            return self.run("cpu")

    def check_stored(self, pool: Tensor) -> None:
        """Values are the projection's, every real token has its key, and nothing else was written."""
        shape, expected = self.shape, self.pool.clone()
        first_value = (shape.heads + shape.kv_heads) * shape.dim
        for slot, row in zip(self.slots.tolist(), self.qkv, strict=True):
            if slot >= 0:
                page, at = divmod(slot, shape.page_size)
                assert not pool[page, :, 1, 0, at].isnan().any()
                expected[page, :, 1, 0, at] = pool[page, :, 1, 0, at]
                expected[page, :, 1, 1, at] = row[first_value:].view(shape.kv_heads, shape.dim)
        assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short contexts have several tiles and splits; and ops take their kernels on CPU, too."""
    monkeypatch.setattr(decode_attention, "_SHORT_TILE", 16)
    monkeypatch.setattr(launch, "interpret_ops", True)


CONTEXTS = [100, 1, 0, 33, 64, 5, 0]
SHAPES = [
    Shape(6, 2, 8, 4),
    Shape(1, 1, 2, 1),
    Shape(4, 4, 24, 16, window=24),
    Shape(5, 1, 10, 3, window=1),
    Shape(12, 2, 128, 32, soft_cap=2.0, sinks=True),
    Shape(14, 2, 64, 64, window=17, sinks=True),
    Shape(15, 1, 32, 16, dtype=torch.float16),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_launch_gives_what_two_give(shape: Shape, device: str) -> None:
    case = Case(shape, CONTEXTS)
    out, pool = case.run(device)
    expected_out, expected_pool = case.in_two_launches(device)
    assert torch.equal(out, expected_out) and not out.isnan().any()
    assert torch.equal(pool.nan_to_num(7.0), expected_pool.nan_to_num(7.0))
    case.check_stored(pool)


@pytest.mark.parametrize("device", DEVICES)
def test_norms_are_rounded_as_in_two_launches(device: str) -> None:
    """The squares are added in another order, which may tip a value that lies between two others."""
    case = Case(Shape(6, 2, 64, 16, norm=True, dtype=torch.float16), CONTEXTS)
    out, pool = case.run(device)
    expected_out, expected_pool = case.in_two_launches(device)
    assert (pool.nan_to_num(7.0) != expected_pool.nan_to_num(7.0)).sum() <= 4
    torch.testing.assert_close(out, expected_out, rtol=2e-3, atol=2e-3)
    case.check_stored(pool)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (3, 3)]),
    st.sampled_from([2, 8, 24]),
    st.sampled_from([3, 16, 32]),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 100)),
)
@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_equals_the_plain_form_for_any_batch(
    contexts: list[int], heads: tuple[int, int], dim: int, page_size: int, norm: bool, window: int | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_attention, "_SHORT_TILE", 16)
        patch.setattr(launch, "interpret_ops", True)
        case = Case(Shape(*heads, dim, page_size, norm=norm, window=window), contexts)
        (out, pool), (expected_out, expected_pool) = case.run("cpu"), case.in_plain_form()
    torch.testing.assert_close(out, expected_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pool, expected_pool, rtol=1e-5, atol=1e-5, equal_nan=True)
    case.check_stored(pool)


# ------------------------------------------------------------ which way


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the calls of `rotary_store`."""
    rows: list[int] = []
    plain = module.rotary_store

    def counted(qkv: Tensor, *rest: Any, **named: Any) -> Tensor:
        rows.append(len(qkv))
        return plain(qkv, *rest, **named)

    monkeypatch.setattr(module, "rotary_store", counted)
    return rows


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
@pytest.mark.parametrize(("heads", "rows"), [(15, []), (16, [2]), (17, []), (32, [2])])
def test_a_group_that_leaves_no_row_for_its_key_takes_two_launches(
    heads: int, rows: list[int], stored: list[int]
) -> None:
    case = Case(Shape(heads, 1, 8, 4), [9, 30])
    out, pool = case.run("cpu")
    assert stored == rows
    torch.testing.assert_close(out, case.in_plain_form()[0], rtol=1e-4, atol=1e-5)
    case.check_stored(pool)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=_CPU)])
def test_prompts_take_two_launches_and_give_the_tokens_that_are_asked_for(
    kernels: bool, stored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "interpret_ops", kernels)
    torch.manual_seed(0)
    batch = PagedBatch.build([1, 3, 2], [5, 3, 6], [[1, 2], [3], [4, 5]], 4, "cpu")
    factors = rotary_factors(batch.positions, torch.ones(4), 1.0, torch.float32)
    qkv, before = torch.randn(6, 4 * 8), torch.randn(6, 2, 1, 4, 8)

    def run(last_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        pool = before.clone()
        out = store_and_attend(
            qkv, factors, pool[:, 0], pool[:, 1], batch, last_tokens, num_heads=2, num_kv_heads=1, scale=0.3
        )
        return out, pool

    (every, pool), (last, pool_too) = run(None), run(torch.tensor([0, 3, 5]))
    assert stored == [6, 6]
    torch.testing.assert_close(last, every[[0, 3, 5]])
    assert torch.equal(pool, pool_too) and not torch.equal(pool, before)


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_what_it_cannot_do_is_refused() -> None:
    batch = PagedBatch.build([1], [1], [[0]], 4, "cpu")
    qkv, pages = torch.zeros(1, 24), torch.zeros(2, 1, 4, 8)
    factors = rotary_factors(batch.positions, torch.ones(4), 1.0, torch.float32)
    options: dict[str, Any] = {"num_heads": 1, "num_kv_heads": 1, "scale": 1.0}
    with pytest.raises(ValueError, match="both or not at all"):
        store_and_attend(qkv, factors, pages, pages, batch, q_norm=torch.ones(8), **options)
    with pytest.raises(ValueError, match="cannot store rows of strides"):
        store_and_attend(qkv, factors, pages, torch.zeros(2, 1, 8, 8)[:, :, :4], batch, **options)


# ------------------------------------------------------------ compiled

COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from penstock.kernels.decode_attention import _decode_kernel as kernel

constants = dict(GROUP=4, QUERY_LEN=1, HEAD_DIM=128, PAGE_SIZE=64, BLOCK_R=16, BLOCK_N=64, BLOCK_D=128, PDL=True)
constants |= dict(PROJECTED=True, MERGE=True, NORM=True, PREFETCH=False, WINDOW=False, SOFT_CAP=False, SINKS=False)
types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr") | {"sinks_ptr": "constexpr"}
types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "q_norm_ptr", "k_norm_ptr"), "*bf16")
types |= dict.fromkeys(("tables_ptr", "rows_ptr", "contexts_ptr", "arrived_ptr"), "*i32")
types |= dict.fromkeys(("partial_ptr", "maxima_ptr", "sums_ptr", "cos_ptr", "sin_ptr"), "*fp32")
types |= dict.fromkeys(("scale", "soft_cap", "eps"), "fp32") | {"slots_ptr": "*i64"}
known = {i: n for i, n in enumerate(kernel.arg_names) if types[n] != "constexpr" and n.endswith(("_ptr", "_stride"))}
aligned = {(i,): [["tt.divisibility", 16]] for i, n in known.items() if n not in ("slots_ptr", "table_stride")}
source = ASTSource(kernel, types, constants | {"sinks_ptr": None}, aligned)
options = {"num_warps": 4, "num_stages": 3}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def test_compiled_for_a_card_the_new_token_is_stored_before_pages_are_read() -> None:
    """The interpreter has no threads that could be early. Compiling needs no card, but a process that does not
    interpret."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    found = re.findall(r"griddepcontrol\.wait|st\.global|bar\.sync|cp\.async\.cg", compiled.stdout)
    wait, store, read = (found.index(name) for name in ("griddepcontrol.wait", "st.global", "cp.async.cg"))
    assert wait < store < read, "nothing is written while the kernel ahead may still run"
    stores = found[:read].count("st.global")
    last_store = read - 1 - found[:read][::-1].index("st.global")
    assert stores >= 2 and "bar.sync" in found[last_store:read], "a key and a value, then all threads wait"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("contexts", [[1025], [4096, 1, 0, 777, 1024] * 13, [300] * 256], ids=len)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (12, 2, 128), (14, 2, 64), (32, 32, 96)])
def test_models_shapes_in_bfloat16_on_a_gpu(
    heads: int, kv_heads: int, dim: int, contexts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_attention, "_SHORT_TILE", 64)
    case = Case(Shape(heads, kv_heads, dim, 64, dtype=torch.bfloat16), contexts)
    out, pool = case.run("cuda")
    expected_out, expected_pool = case.in_two_launches("cuda")
    assert torch.equal(out, expected_out) and not out.isnan().any()
    assert torch.equal(pool.nan_to_num(7.0), expected_pool.nan_to_num(7.0))
    case.check_stored(pool)
