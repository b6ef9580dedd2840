"""Responses that were asked to be kept, in this router's memory: bounded in bytes and in time. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

ResponseKey = tuple[str, str]  # whose API key it was made with ("": no keys are asked for), and its id


@dataclass(frozen=True)
class Stored:
    """A response whose status is final, as JSON.

    `turns` has the items of the conversation up to here, a JSON list for each turn's input and output; `events` those
    of a stream that can be read again.
    """

    response: bytes
    turns: tuple[bytes, ...] = ()
    events: tuple[bytes, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Turns that it shares with earlier responses count each time: those may be gone before it."""
        return len(self.response) + sum(map(len, self.turns)) + sum(map(len, self.events))


class ResponseStore:
    """Keeps each response for `ttl_s`, and of all of them at most `max_bytes`; the oldest go first."""

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes, self._ttl_s = max_bytes, ttl_s
        self._kept: OrderedDict[ResponseKey, tuple[float, Stored]] = (
            OrderedDict()
        )  # with the time of its end, in this order
        self.size_bytes = 0

    def put(self, key: ResponseKey, stored: Stored, now: float) -> None:
        """Keep a response, unless it alone is larger than the store."""
        self.drop_expired(now)
        self.pop(key)
        if stored.size_bytes > self._max_bytes:
            return
        self._kept[key] = (now + self._ttl_s, stored)
        self.size_bytes += stored.size_bytes
        while self.size_bytes > self._max_bytes:
            self.pop(next(iter(self._kept)))

    def get(self, key: ResponseKey, now: float) -> Stored | None:
        """The response; None if it was never kept or is no more."""
        self.drop_expired(now)
        found = self._kept.get(key)
        return None if found is None else found[1]

    def pop(self, key: ResponseKey) -> bool:
        """Forget a response; False if there is none of this id."""
        found = self._kept.pop(key, None)
        if found is None:
            return False
        self.size_bytes -= found[1].size_bytes
        return True

    def drop_expired(self, now: float) -> None:
        """Forget what has been kept long enough."""
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            self.pop(next(iter(self._kept)))

    def __len__(self) -> int:
        return len(self._kept)
