"""The waterfall: where bars stand, and that they never leave the picture."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.common.messages import Spans
from penstock.common.timeline import Timeline
from penstock.waterfall import BLOCK, THIN, bars, in_words, moved_bytes, waterfall

MARKS = {"received": 0.0, "tokenised": 0.010, "routed": 0.020, "first_token": 0.060, "finished": 0.100}
PREFILL = Spans(queue_ms=5.0, prefill_ms=30.0, computed_tokens=64)
DECODE = Spans(
    queue_ms=2.0,
    transfer_ms=25.0,
    exposed_transfer_ms=10.0,
    decode_ms=28.0,
    transfer_bytes=3 * 2**20,
    transfer_pages=4,
    transport="shm",
)


def _timeline() -> list[dict[str, Any]]:
    return Timeline(marks=dict(MARKS)).entries([PREFILL, DECODE])


def test_bars_end_where_their_step_ends() -> None:
    placed = {bar.name: (round(bar.start_ms, 6), round(bar.start_ms + bar.length_ms, 6)) for bar in bars(_timeline())}
    assert placed["tokenise"] == (0.0, 10.0)
    assert placed["route"] == (10.0, 20.0)
    assert placed["admission"] == (20.0, 22.0)
    assert placed["queue"] == (22.0, 27.0)
    assert placed["prefill"] == (30.0, 60.0)
    assert placed["transfer"] == (45.0, 70.0)
    assert placed["decode"] == (72.0, 100.0)


def test_the_picture() -> None:
    lines = {line.split()[0]: line for line in waterfall(_timeline(), width=20)}
    assert lines["prefill"] == f"prefill        30.0 ms  {' ' * 6}{BLOCK * 6}{' ' * 8}  64 tokens"
    assert lines["transfer"].endswith(f"{' ' * 9}{BLOCK * 5}{' ' * 6}  3.0 MiB in 4 pages over shm")
    assert [name for name, line in lines.items() if THIN in line] == ["admission"]


def test_moved_bytes_are_those_of_the_transfer() -> None:
    assert moved_bytes(_timeline()) == 3 * 2**20
    assert moved_bytes(Timeline(marks=dict(MARKS)).entries([PREFILL])) == 0


def test_sizes_in_words() -> None:
    assert [in_words(n) for n in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]


@given(
    marks=st.lists(st.floats(0, 1e5), min_size=5, max_size=5).map(sorted),
    spans=st.lists(st.floats(0, 1e6), min_size=5, max_size=5),
    width=st.integers(1, 80),
)
def test_bars_stay_within_the_picture(marks: list[float], spans: list[float], width: int) -> None:
    timeline = Timeline(marks=dict(zip(MARKS, marks, strict=True)))
    queue, prefill, transfer, exposed, decode = spans
    receiver = Spans(transfer_ms=transfer, transfer_pages=1, exposed_transfer_ms=exposed, decode_ms=decode)
    entries = timeline.entries([Spans(queue_ms=queue, prefill_ms=prefill, computed_tokens=1), receiver])
    for bar in bars(entries):
        assert bar.start_ms >= 0
    for line in waterfall(entries, width):
        picture = line.partition(" ms  ")[2]
        assert picture[:width].strip(f" {BLOCK}{THIN}") == ""
        assert BLOCK not in picture[width:] and THIN not in picture[width:]


def test_an_empty_timeline_draws_nothing() -> None:
    assert waterfall([], 20) == []
