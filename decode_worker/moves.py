"""Pages of requests that have moved to another worker, kept until that worker has asked for them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from penstock.engine.pages import PageManager


class Tail(NamedTuple):
    """The page behind the full ones, which has tokens in a part of it."""

    page: int
    page_hash: bytes
    parent: bytes


class MovedPages:
    """By request id and choice: the next attempt, elsewhere, fetches what this one computed."""

    def __init__(self, pages: PageManager, keep_s: float) -> None:
        """`keep_s`: how long they are kept for a worker that does not ask, because it is gone or needs none."""
        self.total = 0  # requests that have moved, since the start
        self._pages = pages
        self._keep_s = keep_s
        self._until: dict[str, float] = {}  # by holder
        self._tails: dict[str, Tail] = {}  # by holder, as long as a step may write them

    def __len__(self) -> int:
        return len(self._until)

    def holders(self) -> set[str]:
        """For whom pages are held here."""
        return set(self._until)

    def keep(self, request_id: str, choice: int, pages: Sequence[int], now: float, tail: Tail | None = None) -> int:
        """These full pages, and the tail behind them, are not to be evicted for now, as far as they have not been
        promised to others: returns how many, from the first."""
        self.total += 1
        wanted = [*pages, tail.page] if tail is not None else pages
        kept = self._pages.with_room(wanted)
        holder = _holder(request_id, choice)
        if kept:
            self._drop(holder)  # if it comes from here a second time
            self._pages.hold(holder, kept)
            self._until[holder] = now + self._keep_s
            if tail is not None and len(kept) == len(wanted):
                self._tails[holder] = tail
        return len(kept)

    def is_whole(self, request_id: str, choice: int) -> bool:
        """Whether all that is kept can be found: a tail once no step writes it any more. Unknown requests are whole."""
        holder = _holder(request_id, choice)
        tail = self._tails.get(holder)
        if tail is None:
            return True
        if self._pages.is_shared(tail.page):
            return False
        self._pages.name(*self._tails.pop(holder))
        return True

    def release(self, request_id: str, choice: int) -> None:
        """Somebody else holds them now; unknown requests are fine."""
        self._drop(_holder(request_id, choice))

    def expire(self, now: float) -> None:
        """Give up what nobody has asked for."""
        for holder in [holder for holder, until in self._until.items() if now >= until]:
            self._drop(holder)

    def _drop(self, holder: str) -> None:
        self._tails.pop(holder, None)
        if self._until.pop(holder, None) is not None:
            self._pages.release(holder)


def _holder(request_id: str, choice: int) -> str:
    return f"moved {request_id}:{choice}"
