"""Requests that wait to join the batch, in order of arrival; preempted ones come first. Pure; the scheduler's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from penstock.engine.request import Request


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
        self._queue.append(request)

    def put_back(self, request: Request) -> None:
        """To the front: it was preempted, and has lost its pages."""
        self._queue.appendleft(request)

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
