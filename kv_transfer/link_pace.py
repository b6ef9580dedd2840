"""How one peer's link gets on, for all reads over it: how much to post at once, and when to give up. Pure; the clock is
passed in. `PageMover` keeps one for each connected peer and transport.
"""

from __future__ import annotations


class LinkPace:
    """A copy tells nothing before all of it is there, so a slow link would look dead behind a large batch, or many.

    Batches follow the link: one that took longer than `SLOW_S` is followed by one of half the size, one that took less
    than `QUICK_S` by one of twice the size. A link that is slow, or not known yet, carries one batch at a time, another
    `ABREAST`: so none of them takes longer than `ABREAST * SLOW_S` at the pace that was seen.

    A read has stalled when nothing has come over its link, for whomever, for `stall_s`, or for several times as long as
    the link was seen to need; one that a busy link seems to have forgotten, after `FORGOTTEN` times that. Where one has
    stalled on a quiet link, and nothing has come since, no other is begun for `stall_s`.
    """

    SLOW_S, QUICK_S = 0.5, 0.1
    ABREAST = 8
    TIMES_EXPECTED = 4.0
    FORGOTTEN = 12.0

    def __init__(self, most_pages: int, first_pages: int, stall_s: float) -> None:
        self._most = most_pages
        self._stall_s = stall_s
        self._page_s: float | None = None  # as the last batch took, others beside it included
        self._moved_at = self._stalled_at = float("-inf")
        self._in_flight = 0  # without those that have stalled
        self.pages = max(1, min(first_pages, most_pages))  # to post at once

    @property
    def has_room(self) -> bool:
        """Whether one more batch may be posted now."""
        slow = self._page_s is None or self.pages * self._page_s > self.SLOW_S
        return self._in_flight < (1 if slow else self.ABREAST)

    def is_dead(self, now: float) -> bool:
        """Whether a read has stalled for the link's silence just now, and nothing has come since."""
        return self._moved_at < self._stalled_at and now < self._stalled_at + self._stall_s

    def posted(self) -> None:
        """A batch is in flight: `arrived`, `failed` or `stalled` follows."""
        self._in_flight += 1

    def arrived(self, seconds: float, pages: int, now: float) -> None:
        """A batch of so many pages has come."""
        self._in_flight -= 1
        self._moved_at = now
        self._page_s = seconds / pages
        if seconds > self.SLOW_S:
            self.pages = max(1, pages // 2)
        elif seconds < self.QUICK_S and pages == self.pages:  # a read's last batch may be short
            self.pages = min(self._most, 2 * self.pages)

    def failed(self) -> None:
        """A batch has settled without coming: that says nothing of the pace."""
        self._in_flight -= 1

    def stalled(self, posted_at: float, pages: int, now: float) -> bool:
        """Whether a batch of so many pages, in flight since `posted_at`, has stalled. Then it does not count any more:
        should it still come, say so with `came_late`."""
        patience_s = max(self._stall_s, self.TIMES_EXPECTED * pages * (self._page_s or 0.0))
        quiet_s = now - max(posted_at, self._moved_at)
        is_quiet = quiet_s >= patience_s
        if not is_quiet and now - posted_at < self.FORGOTTEN * patience_s:
            return False
        self._in_flight -= 1
        if is_quiet:  # else only this one is stuck
            self._stalled_at = now
        return True

    def came_late(self, seconds: float, pages: int, now: float) -> None:
        """As `arrived`, of a batch that had stalled: the link is slower than was thought."""
        self._in_flight += 1
        self.arrived(seconds, pages, now)
