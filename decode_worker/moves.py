"""Pages of requests that have moved to another worker, kept until that worker has asked for them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.engine.pages import PageManager


class MovedPages:
    """By request id and choice: the next attempt, elsewhere, fetches what this one computed."""

    def __init__(self, pages: PageManager, keep_s: float) -> None:
        """`keep_s`: how long they are kept for a worker that does not ask, because it is gone or needs none."""
        self.total = 0  # requests that have moved, since the start
        self._pages = pages
        self._keep_s = keep_s
        self._until: dict[str, float] = {}  # by holder

    def __len__(self) -> int:
        return len(self._until)

    def holders(self) -> set[str]:
        """For whom pages are held here."""
        return set(self._until)

    def keep(self, request_id: str, choice: int, pages: Sequence[int], now: float) -> int:
        """These pages are not to be evicted for now, as far as they have not been promised to others: returns how many,
        from the first."""
        self.total += 1
        pages = self._pages.with_room(pages)
        if pages:
            holder = _holder(request_id, choice)
            self._pages.release(holder)  # if it comes from here a second time
            self._pages.hold(holder, pages)
            self._until[holder] = now + self._keep_s
        return len(pages)

    def release(self, request_id: str, choice: int) -> None:
        """Somebody else holds them now; unknown requests are fine."""
        holder = _holder(request_id, choice)
        if self._until.pop(holder, None) is not None:
            self._pages.release(holder)

    def expire(self, now: float) -> None:
        """Give up what nobody has asked for."""
        for holder in [holder for holder, until in self._until.items() if now >= until]:
            del self._until[holder]
            self._pages.release(holder)


def _holder(request_id: str, choice: int) -> str:
    return f"moved {request_id}:{choice}"
