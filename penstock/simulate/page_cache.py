"""A virtual worker's pages: held by running requests, or cached and evicted oldest first. Pure; no page has content.

The rules are those of engine/pages.py: a page is held, cached or free; a request takes the pages that its prompt shares
with the cache and evicts others for the rest; at its end its pages are cached, the last one first to go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PageCache:
    """Holds `num_pages` pages. Pages without a name (of outputs, of traces without names) are only counted."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.unnamed = 0  # held, and free again at the end
        self._held: dict[int, int] = {}  # page -> requests that hold it
        self._cached: OrderedDict[int, None] = OrderedDict()  # the oldest first

    @property
    def held(self) -> int:
        """Pages that requests hold: the rest is free, or can be evicted."""
        return len(self._held) + self.unnamed

    @property
    def cached(self) -> int:
        """Pages with a name that nobody holds."""
        return len(self._cached)

    def run(self, pages: Sequence[int]) -> int:
        """How many of these are here, from the first."""
        held, cached = self._held, self._cached
        for count, page in enumerate(pages):
            if page not in held and page not in cached:
                return count
        return len(pages)

    def fits(self, pages: Sequence[int], unnamed: int) -> bool:
        """There is room for a request with these pages."""
        # Counting what is shared is dear, and needed only where there is little room.
        if self.held + len(pages) + unnamed <= self.num_pages:
            return True
        return self.held + unnamed + sum(page not in self._held for page in pages) <= self.num_pages

    def hold(self, pages: Sequence[int], unnamed: int) -> list[int]:
        """Take the pages for a request for which there is room; returns those evicted for it."""
        held, cached = self._held, self._cached
        for page in pages:
            count = held.get(page, 0)
            held[page] = count + 1
            if not count:
                cached.pop(page, None)
        self.unnamed += unnamed
        evicted = []
        for _ in range(len(held) + self.unnamed + len(cached) - self.num_pages):
            evicted.append(cached.popitem(last=False)[0])
        return evicted

    def release(self, pages: Sequence[int], unnamed: int) -> None:
        """Give back what `hold` took: named pages stay, cached."""
        held, cached = self._held, self._cached
        for page in reversed(pages):
            count = held[page] - 1
            if count:
                held[page] = count
            else:
                del held[page]
                cached[page] = None
        self.unnamed -= unnamed
