"""Decides which requests may begin: the only place that says "no room". Pure.

A request is admitted when its whole prompt and one more page can be promised: by priority, then those that come from
another worker, then in order of arrival. Nothing is computed that cannot land. What waits too long is given back as
expired. A sequence that was preempted comes first: while one waits for pages, nobody new is admitted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from penstock.common.messages import GenerateRequest, WorkerInfo, request_key
from penstock.engine.pages import PageManager


@dataclass(eq=False)
class Entry:
    """One request at this decode worker, from `Submit` to its end."""

    identity: bytes  # the router's
    request: GenerateRequest
    prefill: WorkerInfo | None
    arrived: float
    hashes: list[bytes]  # of its full pages
    held_tokens: int = 0  # leading tokens found in this worker's prefix cache at admission
    admitted: float = 0.0
    source: WorkerInfo | None = None  # a worker to fetch the prefix from
    tail: bytes = b""  # of a request that has moved: the hash of what stands behind its full pages at the source

    def __post_init__(self) -> None:
        self.wants_room_since = self.arrived
        self.key = request_key(self.request.request_id, self.request.choice, self.request.attempt)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.request.output_token_ids)


_Place = tuple[int, bool, int, str]  # priority, whether it is new to the fleet, number of arrival, key


class Admission:
    """The queue in front of the engine."""

    def __init__(self, pages: PageManager, max_admitted: int) -> None:
        self._pages = pages
        self._max_admitted = max_admitted
        self._queue: dict[str, Entry] = {}
        self._order: list[_Place] = []
        self._places: dict[str, _Place] = {}
        self._arrivals = 0
        self.queued_tokens = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, key: str) -> bool:
        return key in self._queue

    def entries(self) -> list[Entry]:
        return [self._queue[place[-1]] for place in self._order]

    def submit(self, entry: Entry) -> None:
        self._queue[entry.key] = entry
        self._arrivals += 1
        new = entry.request.attempt == 0  # else it has waited elsewhere, and its stream may stand still meanwhile
        self._places[entry.key] = (entry.request.priority, new, self._arrivals, entry.key)
        insort(self._order, self._places[entry.key])
        self.queued_tokens += entry.num_tokens

    def cancel(self, key: str) -> Entry | None:
        """Take out one entry; None if it is not waiting."""
        entry = self._queue.pop(key, None)
        if entry is not None:
            self.queued_tokens -= entry.num_tokens
            del self._order[bisect_left(self._order, self._places.pop(key))]
        return entry

    def expired(self, now: float) -> list[Entry]:
        """Take out what has waited for room longer than its `queue_timeout_s`."""
        late = [e for e in self._queue.values() if now - e.wants_room_since > e.request.queue_timeout_s]
        for entry in late:
            self.cancel(entry.key)
        return late

    def admit(
        self, now: float, num_admitted: int, *, preempted: bool, waits: Callable[[Entry], bool] = lambda _: False
    ) -> Iterator[Entry]:
        """Take out what may begin now, in order: one at a time, to be begun before the next is looked at.

        Cached prefix pages are held for it already, and the rest of its pages is promised, under its key. Who `waits`
        for something else lets others pass.
        """
        place = 0
        while place < len(self._order) and not preempted and num_admitted < self._max_admitted:
            entry = self._queue[self._order[place][-1]]
            if waits(entry):
                entry.wants_room_since = now
                place += 1
                continue
            # The last token is always computed, for its logits: the page it is in is never taken from the cache.
            matched = self._pages.match(entry.hashes[: (entry.num_tokens - 1) // self._pages.page_size])
            missing = self._pages.pages_for(entry.num_tokens + 1) - len(matched)
            if not self._pages.has_room(entry.key, matched, missing):
                break
            self._pages.hold(entry.key, matched)
            self._pages.promise(entry.key, missing)
            entry.held_tokens = len(matched) * self._pages.page_size
            entry.admitted = now
            self.cancel(entry.key)
            num_admitted += 1
            yield entry
