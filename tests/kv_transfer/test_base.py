"""Coalescing of page lists."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from penstock.kv_transfer.base import runs


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6))))
def test_runs_are_the_same_pairs_in_maximal_pieces(pairs: list[tuple[int, int]]) -> None:
    pieces = list(runs([src for src, _ in pairs], [dst for _, dst in pairs]))
    assert [(src + i, dst + i) for src, dst, number in pieces for i in range(number)] == pairs
    for (src, dst, number), (next_src, next_dst, _) in pairwise(pieces):
        assert (src + number, dst + number) != (next_src, next_dst)
