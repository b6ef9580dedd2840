"""One timeline per request: named marks on the clock of whoever set them.

A process marks with its own monotonic clock. Monotonic clocks of two hosts cannot be compared, so what travels is
durations: each process sends `since`-style spans and the router, which saw the request come and go, places them.
Marks of the router: received, tokenised, routed, first_token, finished.
Spans of the workers (milliseconds, see `Spans` in messages.py): queue, prefill, transfer, admission, decode.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
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
