"""A circuit breaker: whoever fails again and again is left alone for a while, then tried with one request. Pure.

    CLOSED ──`limit` failures in a row──> OPEN ──back-off over──> HALF_OPEN ──success──> CLOSED
       ^ any success starts the count anew   ^──────failure: twice the back-off──┘

A probe that is never heard of again (its client left) is forgotten after one more back-off.
"""

from __future__ import annotations

from enum import Enum

BACK_OFF_FIRST_S = 2.0
BACK_OFF_MOST_S = 60.0


class Circuit(Enum):
    """See the picture above."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Of one worker, or one pair of workers. The clock is passed in and does not go back."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._failures = 0
        self._back_off_s = BACK_OFF_FIRST_S
        self._until = float("-inf")  # OPEN, or taken by a probe, until then
        self._open = False
        self.reason = ""  # of the last failure
        self.failed_at = float("-inf")

    def state(self, now: float) -> Circuit:
        """Where it is."""
        if not self._open:
            return Circuit.CLOSED
        return Circuit.OPEN if now < self._until else Circuit.HALF_OPEN

    def allows(self, now: float) -> bool:
        """Requests may be sent now."""
        return self.state(now) is not Circuit.OPEN

    def began(self, now: float) -> None:
        """One was sent: in HALF_OPEN it is the probe, and no other goes before it is known how that one fared."""
        if self.state(now) is Circuit.HALF_OPEN:
            self._until = now + self._back_off_s

    def failed(self, reason: str, now: float) -> bool:
        """One failed. True: it has been opened by this."""
        self.reason, self.failed_at = reason, now
        self._failures += 1
        if self._open:
            self._back_off_s = min(2 * self._back_off_s, BACK_OFF_MOST_S)
        elif self._failures < self._limit:
            return False
        opened, self._open = not self._open, True
        self._until = now + self._back_off_s
        return opened

    def succeeded(self) -> None:
        """One was served."""
        self._open, self._failures, self._back_off_s = False, 0, BACK_OFF_FIRST_S

    def retry_in_s(self, now: float) -> float:
        """Seconds until the next probe may go; 0: one may, or none is needed."""
        return max(0.0, self._until - now) if self._open else 0.0
