"""Decode attention against a loop in float64: splits, windows, soft caps, sinks, several query tokens, page sizes."""

from __future__ import annotations

import math
import random

import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.kernels import decode_attention as module
from penstock.kernels.decode_attention import DecodePlan, Tiles, decode_attention, decode_attention_reference

_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
_CPU = [pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted")]
DEVICES = [pytest.param("cpu", marks=_CPU), pytest.param("cuda", marks=_GPU)]


def _cuda(dtype: torch.dtype) -> ParameterSet:
    return pytest.param("cuda", dtype, marks=_GPU)


class Case:
    """Sequences in a pool of the engine's layout whose unwritten slots are NaN; tables are rows of a larger one."""

    def __init__(
        self,
        contexts: list[int],
        *,
        query_len: int = 1,
        page_size: int = 4,
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 8,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        counts = [-(-context // page_size) for context in contexts]
        ids = random.Random(1).sample(range(sum(counts) + 3), sum(counts))
        pool = torch.full((sum(counts) + 3, kv_heads, 3, 2, page_size, dim), torch.nan)
        tables = torch.randint(0, sum(counts) + 3, (len(contexts) + 2, max([*counts, 1]) + 1), dtype=torch.int32)
        rows = random.Random(2).sample(range(len(contexts) + 2), len(contexts))
        for row, context, count in zip(rows, contexts, counts, strict=True):
            for index in range(count):
                page = ids.pop()
                tables[row, index] = page
                filled = min(page_size, context - index * page_size)
                pool[page, :, 1, :, :filled] = torch.randn(kv_heads, 2, filled, dim)
        pool = pool.to(device, dtype)
        self.contexts = torch.tensor(contexts, dtype=torch.int32, device=device)
        self.args = (
            torch.randn(len(contexts) * query_len, heads, dim).to(device, dtype),
            pool[:, :, 1, 0],
            pool[:, :, 1, 1],
            tables.to(device),
        )
        self.rows = torch.tensor(rows, dtype=torch.int32, device=device)
        self.query_len, self.kv_heads, self.dim = query_len, kv_heads, dim
        self.plans: dict[int | None, DecodePlan] = {}

    def plan(self, window: int | None) -> DecodePlan:
        if window not in self.plans:
            self.plans[window] = DecodePlan.allocate(
                len(self.contexts), self.query_len, self.kv_heads, self.dim, window, self.contexts.device
            )
        return self.plans[window]

    def run(self, sliding_window: int | None = None, **options: object) -> Tensor:
        q, plan = self.args[0], self.plan(sliding_window)
        plan.lay_out(self.rows, self.contexts)
        out = torch.full_like(q, 7.0)  # and a launch between the plan and who reads it early
        decode_attention(*self.args, scale=0.3, plan=plan, out=out, **options)  # type: ignore[arg-type]
        assert not plan.arrived.any(), "the next layer would count wrongly"
        per_sequence = out.view(len(self.contexts), -1)
        skipped = self.contexts == 0
        assert (per_sequence[skipped] == 7.0).all()
        per_sequence[skipped] = 0.0
        return out.float().cpu()

    def reference(self, **options: object) -> Tensor:
        return decode_attention_reference(*self.args, self.rows, self.contexts, scale=0.3, **options).cpu()  # type: ignore[arg-type]

    def plain_loop(self, window: int | None, cap: float | None, sinks: Tensor | None) -> Tensor:
        q, k_pages, v_pages, tables = (tensor.cpu() for tensor in self.args)
        rows, contexts = self.rows.cpu(), self.contexts.cpu()
        query_len, heads = len(q) // len(contexts), q.shape[1]
        out = torch.zeros(q.shape, dtype=torch.float64)
        for token in range(len(q)):
            sequence, context = token // query_len, int(contexts[token // query_len])
            if not context:
                continue
            last = context - query_len + token % query_len
            seen = range(0 if window is None else max(0, last - window + 1), last + 1)
            for head in range(heads):
                pairs = []
                for position in seen:
                    page = tables[rows[sequence], position // k_pages.shape[2]]
                    where = (page, head * k_pages.shape[1] // heads, position % k_pages.shape[2])
                    score = float(q[token, head].double() @ k_pages[where].double()) * 0.3
                    pairs.append((cap * math.tanh(score / cap) if cap else score, v_pages[where].double()))
                total = sum(math.exp(score) for score, _ in pairs)
                total += 0.0 if sinks is None else math.exp(float(sinks[head]))
                out[token, head] = sum(math.exp(score) / total * value for score, value in pairs)
        return out.float()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short contexts have several tiles and splits."""
    monkeypatch.setattr(module, "tiles_for", lambda head_dim: Tiles(16, 4, 3, 2))
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("window", "cap", "sinks"), [(None, None, False), (5, None, False), (24, 2.0, True), (None, None, True)]
)
@pytest.mark.parametrize("query_len", [1, 3])
def test_equals_the_plain_loop(device: str, window: int | None, cap: float | None, sinks: bool, query_len: int) -> None:
    case = Case([100, 3, 0, 31, 64, 4], query_len=query_len, device=device)
    options = {
        "sliding_window": window,
        "soft_cap": cap,
        "sinks": torch.linspace(-1, 2, 6, device=device) if sinks else None,
    }
    sink_values = torch.linspace(-1, 2, 6) if sinks else None
    expected = case.plain_loop(window, cap, sink_values)
    torch.testing.assert_close(case.reference(**options), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(case.run(**options), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"), [(1, 1, 2, 1), (4, 4, 24, 16), (5, 1, 10, 3), (12, 2, 128, 32)]
)
def test_any_shape(device: str, heads: int, kv_heads: int, dim: int, page_size: int) -> None:
    case = Case([1, 70, 18], heads=heads, kv_heads=kv_heads, dim=dim, page_size=page_size, device=device)
    torch.testing.assert_close(case.run(), case.reference(), rtol=1e-4, atol=1e-5)


# Triton's interpreter multiplies bfloat16 matrices wrongly: numpy has no such type.
@pytest.mark.parametrize(
    ("device", "dtype"), [pytest.param("cpu", torch.float16, marks=_CPU), _cuda(torch.float16), _cuda(torch.bfloat16)]
)
def test_half_precision_is_accumulated_in_float32(device: str, dtype: torch.dtype) -> None:
    case = Case([60, 200], dim=16, page_size=16, dtype=dtype, device=device)
    torch.testing.assert_close(case.run(), case.reference(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contexts=st.lists(st.sampled_from([0, 1, 15, 16, 17, 70]), min_size=1, max_size=7))
def test_sequences_of_any_lengths_share_the_programs(device: str, contexts: list[int]) -> None:
    case = Case(contexts, heads=2, kv_heads=1, page_size=16, device=device)
    torch.testing.assert_close(case.run(), case.reference(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(case.run(), case.reference(), rtol=1e-4, atol=1e-5)  # with what the first has left


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_plan_holds_every_tile_once_and_the_longest_splits_first(device: str, data: st.DataObject) -> None:
    window = data.draw(st.sampled_from([None, 1, 40, 1000]))
    lengths = st.one_of(st.integers(0, 40), st.integers(0, 3000))
    contexts = data.draw(st.lists(lengths, min_size=1, max_size=40))
    rows = data.draw(st.permutations(range(len(contexts))))
    plan = DecodePlan.allocate(len(contexts), 1, 1, 16, window, torch.device(device))
    plan.splits.fill_(99)  # of a step before
    numbers = (torch.tensor(values, dtype=torch.int32, device=device) for values in (rows, contexts))
    plan.lay_out(*numbers)
    used = [split for split in plan.splits.tolist() if split[0] >= 0]
    assert all(split[0] == -1 for split in plan.splits.tolist()[len(used) :])

    tile = plan.tiles.tokens
    firsts = [0 if window is None else max(0, context - window) // tile * tile for context in contexts]
    tiles = [-(-(context - first) // tile) for context, first in zip(contexts, firsts, strict=True)]
    for sequence, context in enumerate(contexts):
        its = [(index, split) for index, split in enumerate(used) if split[0] == sequence]
        assert [split[3] for _, split in its] == [firsts[sequence], *(split[4] for _, split in its[:-1])][: len(its)]
        assert not its or its[-1][1][4] == context
        for index, (_, row, its_context, begin, end, first, count, _) in its:
            assert (row, its_context, first, count) == (rows[sequence], context, its[0][0], len(its))
            assert begin < end and index - first < count
        assert bool(its) == (context > 0)
    sizes = [-(-(split[4] - split[3]) // tile) for split in used]
    longest = {
        split[0]: max(size for size, other in zip(sizes, used, strict=True) if other[0] == split[0]) for split in used
    }
    assert [longest[split[0]] for split in used] == sorted((longest[split[0]] for split in used), reverse=True)
    even = -(-sum(tiles) // plan.resident)
    assert max(sizes, default=0) <= max(1, 2 * even)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("tiles", "splits"),
    [
        ([16], [1] * 16),
        ([520], [8] * 65),
        ([130] * 4, [9] * 15 * 4),
        ([17] * 64, [17] * 64),  # a whole sequence each: all are there at once
        ([128] * 32, [64] * 64),
        ([33] * 38, [11] * 38 * 3),  # two rounds of 11 and not one of 33
        (([8] * 15 + [125]) * 4, [8] * 124),  # the long ones in as short splits as the others
    ],
)
def test_splits_leave_no_gaps(
    monkeypatch: pytest.MonkeyPatch, device: str, tiles: list[int], splits: list[int]
) -> None:
    """With 528 programs there at a time for 8 heads."""
    monkeypatch.setattr(module, "tiles_for", lambda head_dim: Tiles(64, 4, 3, 4))
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)
    plan = DecodePlan.allocate(len(tiles), 1, 8, 128, None, torch.device(device))
    contexts = torch.tensor(tiles, dtype=torch.int32, device=device) * 64
    plan.lay_out(torch.arange(len(tiles), dtype=torch.int32, device=device), contexts)
    found = [-(-(end - begin) // 64) for s, _, _, begin, end, *_ in plan.splits.tolist() if s >= 0]
    assert len(found) == len(splits) and max(found) == max(splits), found
