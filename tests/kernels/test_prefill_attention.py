"""Prompt chunks over the paged cache against a loop over tokens and heads, in float64, that knows no pages or tiles."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.kernels import cudnn_attention, launch, prefill_attention
from penstock.kernels.launch import INTERPRETED
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.prefill_attention import prefill_attention_reference
from penstock.kernels.prefill_triton import Tiles, choose_tiles, prefill_attention_triton

Sequences = list[tuple[int, int]]  # (cached before, new)
SMALL = Tiles(16, 16, 4, 1)
SPLIT = Tiles(16, 16, 4, 1, splits=3)

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


class Case:
    """Sequences with random keys and values, spread over a pool in the engine's layout; their tables in any order."""

    def __init__(
        self, sequences: Sequences, page_size: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        self.sequences, self.dtype, self.page_size = sequences, dtype, page_size
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.contexts = [past + new if new else 0 for past, new in sequences]
        counts = [-(-context // page_size) for context in self.contexts]
        pick = random.Random(1)
        ids = pick.sample(range(sum(counts) + 5), sum(counts))
        # What nobody wrote is NaN and must not be seen; what the table's padding points to is such a page.
        pool = torch.full((sum(counts) + 5, kv_heads, 3, 2, page_size, dim), torch.nan, dtype=dtype)
        unused = next(i for i in range(len(pool)) if i not in ids)
        self.keys = [torch.randn(context, kv_heads, dim).to(dtype) for context in self.contexts]
        self.values = [torch.randn(context, kv_heads, dim).to(dtype) for context in self.contexts]
        self.table_rows = pick.sample(range(len(sequences) + 2), len(sequences))
        self.tables = torch.full((len(sequences) + 2, max([1, *counts]) + 1), unused, dtype=torch.int32)
        for row, count, keys, values in zip(self.table_rows, counts, self.keys, self.values, strict=True):
            pages = [ids.pop() for _ in range(count)]
            self.tables[row, :count] = torch.tensor(pages, dtype=torch.int32)
            for token in range(len(keys)):
                page, slot = pages[token // page_size], token % page_size
                pool[page, :, 1, 0, slot], pool[page, :, 1, 1, slot] = keys[token], values[token]
        self.pool = pool
        self.starts = [0]
        for _, new in sequences:
            self.starts.append(self.starts[-1] + new)
        self.queries = torch.randn(self.starts[-1] + 3, heads, dim).to(dtype)  # three rows of padding
        self.sinks = torch.randn(heads).to(dtype)

    def run(
        self,
        op: Callable[..., None],
        device: str = "cpu",
        *,
        scale: float = 0.3,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: bool = False,
        **options: object,
    ) -> Tensor:
        pool = self.pool.to(device)
        out = torch.full(self.queries.shape, -7.0, dtype=self.dtype, device=device)
        op(
            self.queries.to(device),
            pool[:, :, 1, 0],
            pool[:, :, 1, 1],
            self.tables.to(device),
            torch.tensor(self.table_rows, dtype=torch.int32, device=device),
            torch.tensor(self.starts, dtype=torch.int32, device=device),
            torch.tensor(self.contexts, dtype=torch.int32, device=device),
            scale=scale,
            sliding_window=window,
            soft_cap=soft_cap,
            sinks=self.sinks.to(device) if sinks else None,
            max_query_len=max(new for _, new in self.sequences),
            max_context=max(self.contexts),
            out=out,
            **options,
        )
        return out.cpu()

    def expected(self, window: int | None = None, soft_cap: float | None = None, sinks: bool = False) -> Tensor:
        rows = torch.full(self.queries.shape, -7.0, dtype=torch.float64)
        for i, (past, new) in enumerate(self.sequences):
            for token in range(new):
                last = past + token + 1
                first = 0 if window is None else max(0, last - window)
                query = self.queries[self.starts[i] + token].double()
                for head in range(self.heads):
                    kv_head = head * self.kv_heads // self.heads
                    scores = (self.keys[i][first:last, kv_head].double() @ query[head] * 0.3).tolist()
                    if soft_cap is not None:
                        scores = [soft_cap * math.tanh(score / soft_cap) for score in scores]
                    top = max(scores)
                    weights = torch.tensor([math.exp(score - top) for score in scores]).double()
                    total = float(weights.sum()) + (math.exp(float(self.sinks[head]) - top) if sinks else 0.0)
                    rows[self.starts[i] + token, head] = weights / total @ self.values[i][first:last, kv_head].double()
        return rows


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


MIXTURE: Sequences = [(0, 9), (0, 0), (13, 1), (41, 8)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("page_size", "tiles"), [(1, SMALL), (4, SPLIT), (32, SMALL), (32, SPLIT)], ids=str)
def test_ragged_mixture(page_size: int, tiles: Tiles, device: str) -> None:
    case = Case(MIXTURE, page_size, 4, 2, 16, torch.float32)
    close(case.run(prefill_attention_triton, device, tiles=tiles), case.expected())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("window", "tiles"), [(1, SMALL), (5, SPLIT), (33, SMALL), (1000, SMALL)], ids=str)
def test_sliding_window(window: int, tiles: Tiles, device: str) -> None:
    case = Case(MIXTURE, 4, 4, 2, 16, torch.float32)
    close(case.run(prefill_attention_triton, device, window=window, tiles=tiles), case.expected(window))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tiles", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize(("window", "soft_cap", "sinks"), [(None, 1.5, False), (9, 0.8, True)])
def test_soft_cap_and_sinks(window: int | None, soft_cap: float | None, sinks: bool, tiles: Tiles, device: str) -> None:
    case = Case([(0, 9), (40, 5), (3, 2)], 8, 6, 2, 16, torch.float32)
    got = case.run(prefill_attention_triton, device, window=window, soft_cap=soft_cap, sinks=sinks, tiles=tiles)
    close(got, case.expected(window, soft_cap, sinks))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 24), (7, 1, 80), (2, 1, 256)])
def test_any_number_of_heads_and_size(heads: int, kv_heads: int, dim: int, device: str) -> None:
    case = Case([(21, 11), (0, 3)], 16, heads, kv_heads, dim, torch.float32)
    close(case.run(prefill_attention_triton, device, tiles=SMALL), case.expected())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tiles", [None, Tiles(64, 32, 4, 2, splits=2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_and_tiles(dtype: torch.dtype, tiles: Tiles | None, device: str) -> None:
    case = Case([(50, 30), (0, 7)], 16, 8, 2, 32, dtype)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    close(case.run(prefill_attention_triton, device, tiles=tiles), case.expected(), tolerance)


@pytest.mark.parametrize(("window", "soft_cap", "sinks"), [(None, None, False), (5, 0.9, True)])
def test_the_reference_itself(window: int | None, soft_cap: float | None, sinks: bool) -> None:
    case = Case(MIXTURE, 4, 4, 2, 16, torch.float32)
    got = case.run(prefill_attention_reference, window=window, soft_cap=soft_cap, sinks=sinks)
    close(got, case.expected(window, soft_cap, sinks))


@pytest.mark.parametrize("device", DEVICES)
def test_a_sequence_without_context_is_skipped(device: str) -> None:
    case = Case([(5, 4), (9, 3), (0, 7)], 4, 2, 1, 16, torch.float32)
    expected = case.expected()
    case.contexts[1] = 0
    expected[4:7] = -7.0
    for tiles in (SMALL, SPLIT):
        close(case.run(prefill_attention_triton, device, tiles=tiles), expected)
    close(case.run(prefill_attention_reference, device), expected)


def run_op(case: Case, first: int, device: str, window: int | None = None, backend: str = "AUTO") -> Tensor:
    """The op over a batch of all the case's sequences, of which those before `first` are left alone."""
    tables = [case.tables[row, :-1].tolist() for row in case.table_rows]
    new = [new for _, new in case.sequences]
    batch = PagedBatch.build(new, case.contexts, tables, case.page_size, device)
    pool, queries = case.pool.to(device), case.queries[: case.starts[-1]].to(device)
    out = torch.full_like(queries, -7.0)
    for _ in range(2):  # as two layers with one plan
        prefill_attention.prefill_attention(
            queries,
            pool[:, :, 1, 0],
            pool[:, :, 1, 1],
            batch,
            first,
            scale=0.3,
            sliding_window=window,
            backend=backend,
            out=out,
        )
    return out.cpu()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("triton", [False, True])
def test_the_op_begins_at_the_first_prompt(triton: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpret_ops", triton)
    case = Case([(5, 1), (9, 1), (0, 7), (20, 5)], 4, 4, 2, 16, torch.float32)
    expected = case.expected(window)[: case.starts[-1]]
    expected[:2] = -7.0
    close(run_op(case, 2, "cpu", window), expected)


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
@pytest.mark.parametrize(("past", "new"), [(0, 16), (0, 20), (16, 16), (21, 20), (130, 16)])
def test_long_prompts_in_two_dense_parts(new: int, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpret_ops", True)
    monkeypatch.setattr(cudnn_attention, "UNIT", 16)
    monkeypatch.setattr(prefill_attention, "uses_cudnn", lambda _q, _page_size, tokens, _backend: tokens >= 16)
    case = Case([(5, 1), (40, 17), (past, new), (2, 4)], 4, 4, 2, 16, torch.float32)
    expected = case.expected()[: case.starts[-1]]
    expected[:1] = -7.0
    close(run_op(case, 1, "cpu"), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["AUTO", "CUDNN", "HOPPER", "TRITON"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "sequences", [[(0, 1024)], [(0, 1), (1030, 1100), (0, 50)], [(2048, 1024), (3000, 1500)]], ids=str
)
def test_long_prompts_on_a_gpu(sequences: Sequences, dim: int, backend: str) -> None:
    case = Case(sequences, 16, 4, 2, dim, torch.bfloat16)
    expected = case.run(prefill_attention_reference, "cuda")[: case.starts[-1]].double()
    close(run_op(case, 0, "cuda", backend=backend), expected, 2e-2)


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
@settings(max_examples=5, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=3).filter(
        lambda sequences: any(new for _, new in sequences)
    ),
    st.sampled_from([1, 3, 8, 16]),
    st.sampled_from([(2, 1), (3, 3), (6, 2)]),
    st.one_of(st.none(), st.integers(1, 60)),
    st.integers(1, 3),
)
def test_any_batch(
    sequences: Sequences, page_size: int, heads: tuple[int, int], window: int | None, splits: int
) -> None:
    case = Case(sequences, page_size, *heads, 16, torch.float32)
    tiles = Tiles(16, 16, 4, 1, splits)
    close(case.run(prefill_attention_triton, window=window, tiles=tiles), case.expected(window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [16, 24, 32, 80, 128])
@pytest.mark.parametrize("window", [None, 20])
def test_rows_that_see_nothing_of_a_split_count_for_nothing(dim: int, window: int | None) -> None:
    """With any scale: a fused multiply and add rounds the mark of what is unseen up for one and down for another."""
    case = Case([(31, 16), (90, 40), (0, 33)], 16, 4, 2, dim, torch.float32)
    for scale in (dim**-0.5, *(0.05 + 0.013 * i for i in range(12))):
        expected = case.run(prefill_attention_reference, "cuda", scale=scale, window=window)
        for tiles in (Tiles(32, 32, 4, 1, splits=3), Tiles(32, 32, 4, 1, splits=1)):
            got = case.run(prefill_attention_triton, "cuda", scale=scale, window=window, tiles=tiles)
            close(got, expected.double(), 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_graph_serves_other_lengths() -> None:
    cases = [
        Case([(30, 40), (5, 8)], 16, 8, 2, 64, torch.bfloat16),
        Case([(0, 9), (0, 0)], 16, 8, 2, 64, torch.bfloat16),
    ]
    big, small = cases
    device = torch.device("cuda")
    pool, tables = big.pool.to(device), big.tables.to(device)
    queries = big.queries.to(device)
    rows, starts, contexts = (
        torch.tensor(values, dtype=torch.int32, device=device) for values in (big.table_rows, big.starts, big.contexts)
    )
    out = torch.full_like(queries, -7.0)

    def step() -> None:
        prefill_attention_triton(
            queries, pool[:, :, 1, 0], pool[:, :, 1, 1], tables, rows, starts, contexts,
            scale=0.3, sliding_window=None, max_query_len=40, max_context=70, out=out,
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    close(out.cpu(), big.expected(), 2e-2)
    queries[:12] = small.queries.to(device)
    pages = small.pool.to(device)
    pool[: len(pages)], tables[:, : small.tables.shape[1]] = pages, small.tables.to(device)
    for held, values in ((rows, small.table_rows), (starts, small.starts), (contexts, small.contexts)):
        held.copy_(torch.tensor(values, dtype=torch.int32))
    out.fill_(-7.0)
    graph.replay()
    close(out[:12].cpu(), small.expected(), 2e-2)
    assert bool((out[12:] == -7.0).all())


def test_short_chunks_over_long_contexts_are_split() -> None:
    def splits(tokens: int, sequences: int, context: int) -> int:
        return choose_tiles(4, 128, 2, tokens, 8, tokens // sequences, context, 132).splits

    assert splits(16, 1, 8192) == 32
    assert splits(128, 1, 8192) == 4
    assert splits(8192, 1, 8192) == 1
    assert splits(16, 1, 64) == 1
    assert splits(4096, 256, 8192) == 1
