"""What becomes of a request that nobody has worked on yet: it goes to its workers, waits its turn, or is refused. Pure.

    arrives ──nobody waits, the fleet has room──────────────> go
       │  └──the fleet is full, or somebody waits──> queue ──its turn, room──> go
       └────── an objective or a limit would be missed ──────> refused, at once, with when to try again

The fleet is full for a request if it would wait more than `HOLD_MS` at its workers, for prompts before it, a slot or
pages: that much keeps them busy, and what waits here rather than there can still be put in order. The queue is in
fair_queue.py, the predictions come from expected.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from penstock.common.errors import Overloaded, PenstockError, QueueFull, SloUnattainable
from penstock.router.expected import Expected
from penstock.router.fair_queue import FairQueue, Place

HOLD_MS = 1000.0
RETRY_AT_MOST_S = 60.0
RATE_MEMORY_S = 10.0

Item = TypeVar("Item")


@dataclass(frozen=True)
class Limits:
    """What is promised, and what may wait. 0: no such objective."""

    slo_ttft_ms: float = 0.0
    slo_tpot_ms: float = 0.0
    max_queued: int = 1024
    queue_timeout_s: float = 60.0


def refusal(limits: Limits, found: Expected, waited_ms: float, ahead_ms: float = 0.0) -> PenstockError | None:
    """Why a request must not go where it is expected to fare like this; None: it may.

    `waited_ms` has passed since it came, `ahead_ms` will pass before it is its turn.
    """
    ttft_ms, slo_ms = waited_ms + ahead_ms + found.ttft_ms, limits.slo_ttft_ms
    if slo_ms and ttft_ms > slo_ms:
        if found.prefill_ms > slo_ms:  # trying again is of no use
            text = f"computing the prompt takes about {found.prefill_ms:.0f} ms on an idle worker"
            return SloUnattainable(
                f"{text}, more than the {slo_ms:.0f} ms allowed until the first token", hopeless=True
            )
        text = f"the first token would take about {ttft_ms:.0f} ms, more than the {slo_ms:.0f} ms allowed"
        return SloUnattainable(text, retry_after_s=retry_after_s(ttft_ms - slo_ms))
    if limits.slo_tpot_ms and found.tpot_ms > limits.slo_tpot_ms:
        text = f"tokens would come about {found.tpot_ms:.1f} ms apart, {limits.slo_tpot_ms:.1f} ms are allowed"
        return SloUnattainable(text, retry_after_s=retry_after_s(found.room_ms))
    wait_ms = ahead_ms + found.wait_ms
    if ahead_ms and wait_ms > limits.queue_timeout_s * 1e3:
        about = f"about {wait_ms / 1e3:.0f} s" if math.isfinite(wait_ms) else "for nobody knows how long"
        text = f"it would wait {about}, {limits.queue_timeout_s:.0f} s are allowed"
        return Overloaded(text, retry_after_s=retry_after_s(wait_ms - limits.queue_timeout_s * 1e3))
    return None


def retry_after_s(excess_ms: float) -> float:
    """When what is too much now is worked off, in whole seconds: a fleet works off a millisecond in a millisecond."""
    return float(math.ceil(min(RETRY_AT_MOST_S, max(1.0, excess_ms / 1e3))))


def is_full(found: Expected) -> bool:
    """The request had better wait at the router."""
    return found.wait_ms > HOLD_MS


class DrainRate:
    """Cost that leaves the queue a second, lately; as long as nothing has left, what it was expected to be."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._at = 0.0

    def begin(self, expected_rate: float, now: float) -> None:
        """Somebody waits, after nobody did."""
        self._rate, self._at = expected_rate, now

    def left(self, cost: float, now: float) -> None:
        """So much has left."""
        self._rate = self._decayed(now) + cost / RATE_MEMORY_S
        self._at = now

    def needs_ms(self, cost: float, now: float) -> float:
        """Until so much will have left; infinite only if nothing ever has, and nothing was expected to."""
        # Not `_decayed`: while one long prompt holds up a small fleet nothing leaves, and that would soon call all that
        # wait behind it hopeless. Nothing in t seconds means a rate of about 1 / t, not of e^-t.
        rate = self._rate / (1.0 + max(0.0, now - self._at) / RATE_MEMORY_S)
        return cost * 1e3 / rate if rate > 0 else (math.inf if cost else 0.0)

    def _decayed(self, now: float) -> float:
        return self._rate * math.exp(-max(0.0, now - self._at) / RATE_MEMORY_S)


class Admission(Generic[Item]):
    """The queue of one router with its limits; counts refusals by reason."""

    def __init__(self, limits: Limits, weights: Mapping[str, float] | None = None) -> None:
        self.limits = limits
        self.refused: Counter[str] = Counter({"slo": 0, "wait": 0, "queue_full": 0, "in_flight": 0})
        self._queue: FairQueue[Item] = FairQueue(weights)
        self._rate = DrainRate()

    def __len__(self) -> int:
        return len(self._queue)

    def judge(self, found: Expected, waited_ms: float) -> PenstockError | bool:
        """It is the request's turn: an error, True: go, or False: wait (on)."""
        error = refusal(self.limits, found, waited_ms)
        return self._count(error) if error is not None else not is_full(found)

    def enqueue(
        self,
        key: Hashable,
        tenant: str,
        priority: int,
        cost: float,
        item: Item,
        found: Expected,
        capacity: float,
        now: float,
    ) -> list[tuple[Place[Item], PenstockError]]:
        """Let it wait. Returns who is refused, and why: itself, or whoever stands last in a queue that is too long.

        `found` is what it may expect once its turn has come, `capacity` the cost that the fleet works off a second.
        """
        if not self._queue:
            self._rate.begin(capacity, now)
        place = self._queue.place(key, tenant, priority, cost, item)
        ahead_ms = self._rate.needs_ms(self._queue.ahead(place), now)
        error = refusal(self.limits, found, 0.0, ahead_ms)
        if error is not None:
            return [(place, self._count(error))]
        self._queue.push(place)
        if len(self._queue) <= self.limits.max_queued:
            return []
        last = self._queue.pop_last()
        after_s = retry_after_s(self._rate.needs_ms(self._queue.ahead(last), now))
        text = f"{self.limits.max_queued} requests wait, and this key's share of them is used up"
        return [(last, self._count(QueueFull(text, retry_after_s=after_s)))]

    def next(self) -> Place[Item] | None:
        """Whose turn it is; the caller finds out whether there is room, and calls `went` or `back`."""
        return self._queue.pop()

    def went(self, place: Place[Item], now: float) -> None:
        """It was its turn, and it waits no longer."""
        self._rate.left(place.cost, now)

    def back(self, place: Place[Item]) -> None:
        """There is no room yet."""
        self._queue.push(place)

    def forget(self, key: Hashable) -> None:
        """It waits no longer, whatever the reason."""
        self._queue.remove(key)

    def _count(self, error: PenstockError) -> PenstockError:
        reason = (
            "slo" if isinstance(error, SloUnattainable) else "queue_full" if isinstance(error, QueueFull) else "wait"
        )
        self.refused[reason] += 1
        return error
