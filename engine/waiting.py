"""Requests that wait to join the batch: by priority, preempted ones first, then in order of arrival. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from penstock.engine.request import Request


def least_urgent(running: Sequence[Request]) -> Request:
    """The newest of those with the least priority; `running`, not empty, is in order of arrival."""
    return max(reversed(running), key=lambda request: request.source.priority)


class WaitingQueue:
    """The queue, and how many in it hold a claim: pages, or a promise, of their own."""

    def __init__(self) -> None:
        self._queue: deque[Request] = deque()
        self.num_claims = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queue)

    def append(self, request: Request, *, has_claim: bool) -> None:
        request.has_claim = has_claim
        self.num_claims += has_claim
        at = len(self._queue)
        while at and self._queue[at - 1].source.priority > request.source.priority:
            at -= 1
        self._queue.insert(at, request)

    def put_back(self, request: Request) -> None:
        """To the front of its priority: it was preempted, and has lost its pages."""
        at = 0
        while at < len(self._queue) and self._queue[at].source.priority < request.source.priority:
            at += 1
        self._queue.insert(at, request)

    def remove(self, request: Request) -> None:
        self._queue.remove(request)
        self.num_claims -= request.has_claim
        request.has_claim = False

    def expired(self, now: float) -> list[Request]:
        """Those that waited longer than they may without ever having been planned."""
        return [r for r in self._queue if r.first_planned is None and now - r.arrived > r.source.queue_timeout_s]

    def with_room(self, *, slots: int, pages: int, page_size: int, num_tokens: int) -> tuple[int, int]:
        """How many from the front fit into so many slots and pages, up to `num_tokens` tokens to compute, and these.

        Pages that may be found in the prefix cache count as missing.
        """
        count = total = 0
        for request in self._queue:
            pages -= -(-request.num_known // page_size)
            if count == slots or pages < 0 or total >= num_tokens:
                break
            count += 1
            total += request.num_to_compute
        return count, total
