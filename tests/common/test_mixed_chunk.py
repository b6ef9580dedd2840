"""How chunks grow with the sequences beside them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.common.mixed_chunk import SEQUENCES, chunk_beside, room_for


def test_chunks_by_hand() -> None:
    assert [chunk_beside(152, sequences) for sequences in (0, 1, 8, 9, 16, 38, 64, 300)] == [
        152, 152, 152, 176, 176, 272, 320, 152 + 3 * 292,
    ]  # fmt: skip


@given(st.integers(1, 4096), st.integers(0, 600), st.integers(0, 600))
def test_more_sequences_never_make_a_chunk_shorter(few_tokens: int, fewer: int, more: int) -> None:
    assert chunk_beside(few_tokens, fewer) <= chunk_beside(few_tokens, fewer + more)
    assert room_for(fewer) >= fewer and (room_for(fewer) in SEQUENCES or fewer > SEQUENCES[-1])
    assert chunk_beside(few_tokens, fewer) == chunk_beside(few_tokens, room_for(fewer)), "all in a room get the same"
