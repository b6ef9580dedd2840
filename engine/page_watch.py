"""How long sampled KV pages live, lie idle and wait to be used again (`--kv-cache-metrics`). Fed by `PageManager`.

A page is watched, or not, from when it is allocated: a life ends when its cached contents are evicted, and only lives
that end so are counted, as vLLM does. The clock and the choice are passed in.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from penstock.common.histogram import PAGE_SECONDS, Histogram


class PageWatch:
    """Counts of one pool. `share` of the pages that are allocated are watched."""

    def __init__(self, share: float, clock: Callable[[], float], choose: Callable[[], float] | None = None) -> None:
        self.lifetime_s = Histogram(PAGE_SECONDS)
        self.idle_s = Histogram(PAGE_SECONDS)  # last use until evicted
        self.reuse_gap_s = Histogram(PAGE_SECONDS)  # between two uses
        self._share, self._clock, self._choose = share, clock, choose or random.Random(0).random
        self._used: dict[int, list[float]] = {}  # page -> when it was allocated, and used again

    def allocated(self, page: int) -> None:
        """The page begins a new life."""
        self._used.pop(page, None)
        if self._choose() < self._share:
            self._used[page] = [self._clock()]

    def used(self, page: int) -> None:
        """Its contents were found and are held once more."""
        if page in self._used:
            self._used[page].append(self._clock())

    def evicted(self, page: int) -> None:
        """Its contents are given up for others."""
        used = self._used.pop(page, None)
        if used is not None:
            now = self._clock()
            self.lifetime_s.observe(now - used[0])
            self.idle_s.observe(now - used[-1])
            for earlier, later in pairwise(used):
                self.reuse_gap_s.observe(later - earlier)

    def histograms(self) -> dict[str, list[float]]:
        """As they travel in `WorkerLoad`."""
        return {
            "page_lifetime_s": self.lifetime_s.packed(),
            "page_idle_s": self.idle_s.packed(),
            "page_reuse_gap_s": self.reuse_gap_s.packed(),
        }
