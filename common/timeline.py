"""One timeline per request: named marks on the clock of whoever set them.

A process marks with its own monotonic clock. Monotonic clocks of two hosts cannot be compared, so what travels is
durations: each process sends `since`-style spans and the router, which saw the request come and go, places them.
Marks of the router: received, tokenised, routed, first_token, finished.
Spans of the workers (milliseconds, see `Spans` in messages.py): admission, queue, fetch, prefill, transfer, decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.common.messages import Spans


@dataclass(slots=True)
class Timeline:
    """Marks in seconds on one monotonic clock, in the order of the request's life."""

    marks: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str, now: float) -> None:
        """Set a mark once; a later attempt of the same request does not move it."""
        self.marks.setdefault(name, now)

    def between(self, start: str, end: str) -> float | None:
        """Seconds from one mark to another, or None while either is missing."""
        if start in self.marks and end in self.marks:
            return self.marks[end] - self.marks[start]
        return None

    def entries(self, spans: Sequence[Spans] = ()) -> list[dict[str, Any]]:
        """The request's life for people, in order. Each entry has `name`, `ms` and `kind`.

        kind "mark": `ms` since the first mark. kind "span": `ms` a worker spent on it, with what it moved or saved
        (prefill: cached_tokens, computed_tokens; transfer: transfer_bytes, transfer_pages, transport, exposed_ms;
        fetch: fetched_tokens, fetch_bytes, source, transport).
        `spans` are those of the workers in the order in which they ended their part: prefill worker, decode worker.
        """
        start = min(self.marks.values(), default=0.0)
        before = [entry for span in reversed(spans) for entry in _admission(span, len(spans))]
        before += [entry for span in spans for entry in _prefill(span, len(spans))]
        after = [entry for span in spans for entry in (*_transfer(span), *_decode(span))]
        entries: list[dict[str, Any]] = []
        for name, at in self.marks.items():
            if name in ("first_token", "finished"):
                entries, before = entries + before, []
            if name == "finished":
                entries, after = entries + after, []
            entries.append({"name": name, "ms": round((at - start) * 1e3, 3), "kind": "mark"})
        return entries + before + after


def _span(name: str, ms: float, **facts: Any) -> dict[str, Any]:
    return {"name": name, "ms": round(ms, 3), "kind": "span", **facts}


def receives(span: Spans, num_spans: int) -> bool:
    """True for a decode worker whose prompt was computed elsewhere."""
    return span.transfer_pages > 0 or (num_spans > 1 and not span.computed_tokens)


def _admission(span: Spans, num_spans: int) -> list[dict[str, Any]]:
    return [_span("admission", span.queue_ms)] if receives(span, num_spans) else []


def _prefill(span: Spans, num_spans: int) -> list[dict[str, Any]]:
    entries = [] if receives(span, num_spans) else [_span("queue", span.queue_ms)]
    if span.source:
        facts = {"fetched_tokens": span.fetched_tokens, "fetch_bytes": span.fetch_bytes, "source": span.source}
        entries.append(_span("fetch", span.fetch_ms, **facts, transport=span.transport))
    if span.computed_tokens or span.cached_tokens or span.prefill_ms:
        facts = {"cached_tokens": span.cached_tokens, "computed_tokens": span.computed_tokens}
        entries.append(_span("prefill", span.prefill_ms, **facts))
    return entries


def _transfer(span: Spans) -> list[dict[str, Any]]:
    if not span.transfer_pages:
        return []
    facts = {"transfer_bytes": span.transfer_bytes, "transfer_pages": span.transfer_pages, "transport": span.transport}
    facts |= {"exposed_ms": round(span.exposed_transfer_ms, 3), "checksum_failures": span.checksum_failures}
    return [_span("transfer", span.transfer_ms, **facts)]


def _decode(span: Spans) -> list[dict[str, Any]]:
    if not span.decode_ms:
        return []
    return [_span("decode", span.decode_ms, preemptions=span.preemptions, local_prefill=span.local_prefill)]
