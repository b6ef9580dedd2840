"""The request's life in order, for every way a request can run."""

from __future__ import annotations

from penstock.common.messages import Spans
from penstock.common.timeline import Timeline

PREFILL = Spans(queue_ms=1.0, prefill_ms=9.0, computed_tokens=100, cached_tokens=16)
DECODE = Spans(
    queue_ms=2.0, transfer_ms=5.0, exposed_transfer_ms=0.5, decode_ms=40.0, transfer_bytes=1 << 20, transfer_pages=4,
    transport="nixl",
)  # fmt: skip
ALONE = Spans(queue_ms=1.0, prefill_ms=9.0, computed_tokens=100, decode_ms=40.0, local_prefill=True)


def timeline() -> Timeline:
    made = Timeline()
    for name, at in (("received", 10.0), ("tokenised", 10.002), ("routed", 10.003), ("first_token", 10.02)):
        made.mark(name, at)
    made.mark("finished", 10.1)
    return made


def names(spans: list[Spans]) -> list[str]:
    return [entry["name"] for entry in timeline().entries(spans)]


def test_order() -> None:
    begin, end = ["received", "tokenised", "routed"], "finished"
    assert names([]) == [*begin, "first_token", end]
    assert names([ALONE]) == [*begin, "queue", "prefill", "first_token", "decode", end]
    split = [*begin, "admission", "queue", "prefill", "first_token", "transfer", "decode", end]
    assert names([PREFILL, DECODE]) == split
    split.insert(split.index("prefill"), "fetch")
    fetched = Spans(queue_ms=1.0, prefill_ms=9.0, computed_tokens=4, fetch_ms=3.0, fetched_tokens=96, source="decode-1")
    assert names([fetched, DECODE]) == split


def test_values() -> None:
    by_name = {entry["name"]: entry for entry in timeline().entries([PREFILL, DECODE])}
    assert by_name["received"] == {"name": "received", "ms": 0.0, "kind": "mark"}
    assert by_name["first_token"]["ms"] == 20.0 and by_name["finished"]["ms"] == 100.0
    assert (by_name["admission"]["ms"], by_name["queue"]["ms"]) == (2.0, 1.0)
    assert (by_name["prefill"]["cached_tokens"], by_name["prefill"]["computed_tokens"]) == (16, 100)
    assert by_name["transfer"]["transfer_bytes"] == 1 << 20 and by_name["transfer"]["transport"] == "nixl"


def test_marks_stay_where_they_were_set_first() -> None:
    marks = timeline()
    marks.mark("first_token", 99.0)
    assert marks.between("routed", "first_token") == 10.02 - 10.003
    assert marks.between("routed", "never") is None


def test_a_request_that_ended_early_shows_what_there_is() -> None:
    marks = Timeline()
    marks.mark("received", 1.0)
    assert [entry["name"] for entry in marks.entries([ALONE])] == ["received", "queue", "prefill", "decode"]
