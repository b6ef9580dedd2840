"""Paged attention against a loop over tokens and heads that knows nothing of pages, masks or batches."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.kernels.paged_attention import begin_attention, paged_attention
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.rotary_store import store_kv

Sequences = list[tuple[int, int]]  # (cached before, new)


class Case:
    """Sequences with random keys and values, spread over a pool in the engine's layout."""

    def __init__(
        self, sequences: Sequences, page_size: int, heads: int, kv_heads: int, dim: int, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        contexts = [past + new for past, new in sequences]
        counts = [-(-context // page_size) for context in contexts]
        ids = random.Random(1).sample(range(sum(counts) + 5), sum(counts))
        self.tables = [[ids.pop() for _ in range(count)] for count in counts]
        # Layer 1 of 3. What nobody wrote is NaN and must not be seen.
        pool = torch.full((sum(counts) + 5, kv_heads, 3, 2, page_size, dim), torch.nan, device=device)
        self.k_pages, self.v_pages = pool[:, :, 1, 0], pool[:, :, 1, 1]
        self.keys = [torch.randn(context, kv_heads, dim) for context in contexts]
        self.values = [torch.randn(context, kv_heads, dim) for context in contexts]
        self.queries = [torch.randn(new, heads, dim) for _, new in sequences]
        self.sequences, self.page_size, self.device = sequences, page_size, device

    def run(self, window: int | None) -> Tensor:
        cached = [i for i, (past, _) in enumerate(self.sequences) if past]
        if cached:
            self._store(cached, [0] * len(cached), [self.sequences[i][0] for i in cached])
        everyone = list(range(len(self.sequences)))
        batch = self._store(
            everyone, [past for past, _ in self.sequences], [past + new for past, new in self.sequences]
        )
        begin_attention(batch, [window], self.k_pages.shape[1], self.k_pages.shape[3])
        q = torch.cat(self.queries).to(self.device)
        return paged_attention(q, self.k_pages, self.v_pages, batch, scale=0.3, sliding_window=window).cpu()

    def _store(self, members: list[int], begins: list[int], ends: list[int]) -> PagedBatch:
        new = [end - begin for begin, end in zip(begins, ends, strict=True)]
        batch = PagedBatch.build(new, ends, [self.tables[i] for i in members], self.page_size, self.device)
        spans = list(zip(members, begins, ends, strict=True))
        k = torch.cat([self.keys[i][begin:end] for i, begin, end in spans])
        v = torch.cat([self.values[i][begin:end] for i, begin, end in spans])
        store_kv(k.to(self.device), v.to(self.device), self.k_pages, self.v_pages, batch)
        return batch

    def expected(self, window: int | None) -> Tensor:
        rows = []
        for i, (past, new) in enumerate(self.sequences):
            for token in range(new):
                last = past + token + 1
                first = 0 if window is None else max(0, last - window)
                for head in range(self.heads):
                    kv_head = head * self.kv_heads // self.heads
                    scores = self.keys[i][first:last, kv_head].double() @ self.queries[i][token, head].double() * 0.3
                    weights = torch.tensor([math.exp(score) for score in (scores - scores.max()).tolist()]).double()
                    rows.append(weights / weights.sum() @ self.values[i][first:last, kv_head].double())
        return torch.stack(rows).view(-1, self.heads, self.dim).float()


MIXTURES: list[Sequences] = [
    [(0, 1)],
    [(16, 1)],
    [(9, 1), (9, 1), (9, 1)],
    [(0, 7)],
    [(5, 11)],
    [(100, 1), (3, 1), (0, 1), (31, 1), (4, 1)],
    [(0, 20), (7, 1), (13, 6), (40, 1), (0, 1), (2, 2)],
]


@pytest.mark.parametrize("window", [None, 1, 5, 24, 1000])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("sequences", MIXTURES, ids=str)
def test_equals_the_plain_loop(sequences: Sequences, page_size: int, window: int | None) -> None:
    case = Case(sequences, page_size, heads=6, kv_heads=2, dim=8)
    torch.testing.assert_close(case.run(window), case.expected(window), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("sequences", MIXTURES[-2:], ids=str)
def test_equals_the_plain_loop_on_a_gpu(sequences: Sequences, window: int | None) -> None:
    case = Case(sequences, 16, heads=6, kv_heads=2, dim=8, device="cuda")
    torch.testing.assert_close(case.run(window), case.expected(window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 2), (4, 4, 24), (5, 1, 10), (7, 7, 6)])
def test_any_number_of_heads(heads: int, kv_heads: int, dim: int) -> None:
    case = Case(MIXTURES[-1], 4, heads, kv_heads, dim)
    torch.testing.assert_close(case.run(None), case.expected(None), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 12))), min_size=1, max_size=6),
    st.sampled_from([2, 3, 8]),
    st.one_of(st.none(), st.integers(1, 50)),
)
def test_equals_the_plain_loop_for_any_batch(sequences: Sequences, page_size: int, window: int | None) -> None:
    case = Case(sequences, page_size, heads=2, kv_heads=1, dim=4)
    torch.testing.assert_close(case.run(window), case.expected(window), rtol=1e-4, atol=1e-5)


def test_a_query_may_be_a_strided_view() -> None:
    case = Case([(3, 1), (8, 1)], 4, heads=4, kv_heads=2, dim=8)
    expected = case.expected(None)
    wide = torch.randn(2, 6, 8)
    wide[:, :4] = torch.cat(case.queries)
    case.queries = [wide[:1, :4], wide[1:, :4]]
    case.run(None)  # stores the keys
    batch = PagedBatch.build([1, 1], [4, 9], case.tables, 4, "cpu")
    out = paged_attention(wide[:, :4], case.k_pages, case.v_pages, batch, scale=0.3, sliding_window=None)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_accumulated_in_float32() -> None:
    case = Case([(60, 1), (11, 1), (0, 30)], 16, heads=4, kv_heads=2, dim=16)
    for name in ("keys", "values", "queries"):
        setattr(case, name, [tensor.bfloat16() for tensor in getattr(case, name)])
    case.k_pages, case.v_pages = case.k_pages.bfloat16(), case.v_pages.bfloat16()
    torch.testing.assert_close(case.run(None).float(), case.expected(None), rtol=2e-2, atol=2e-2)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 5),
)
def test_layout_of_a_step(sequences: Sequences, page_size: int) -> None:
    tables = [[100 * i + page for page in range(30)] for i in range(len(sequences))]
    new, contexts = [n for _, n in sequences], [past + n for past, n in sequences]
    batch = PagedBatch.build(new, contexts, tables, page_size, "cpu")
    where = [(i, position) for i, (past, n) in enumerate(sequences) for position in range(past, past + n)]
    assert batch.positions.tolist() == [position for _, position in where]
    expected = [tables[i][position // page_size] * page_size + position % page_size for i, position in where]
    assert batch.slots.tolist() == expected
    assert (batch.slot_pages * page_size + batch.slot_offsets).tolist() == expected
    assert batch.last_rows.tolist() == [sum(new[: i + 1]) - 1 for i in range(len(new))]
    assert batch.page_tables.shape == (len(sequences), max(-(-context // page_size) for context in contexts))


@pytest.mark.parametrize(
    ("new", "context", "table", "message"),
    [
        (0, 4, [1], "got 0 and 4"),
        (5, 4, [1, 2], "got 5 and 4"),
        (1, 5, [1], "5 tokens need 2 pages of 4, the page table has 1"),
    ],
)
def test_impossible_steps_are_refused(new: int, context: int, table: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedBatch.build([new], [context], [table], 4, "cpu")
