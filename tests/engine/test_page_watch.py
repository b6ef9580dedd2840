"""Lives of watched pages, through the page manager, on a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from penstock.common.histogram import Histogram
from penstock.engine.page_watch import PageWatch
from penstock.engine.pages import PageManager


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def count(histogram: Histogram) -> int:
    return sum(histogram.counts)


def test_a_life_from_allocation_to_eviction() -> None:
    clock = Clock()
    watch = PageWatch(1.0, clock)
    pages = PageManager(2, 4, watch=watch)
    [first] = pages.allocate("a", 1)
    pages.name(first, b"hash")
    pages.release("a")
    for _ in range(2):  # found again after 3 seconds, twice
        clock.now += 3.0
        pages.hold("b", pages.match([b"hash"]))
        pages.release("b")
    clock.now += 4.0
    pages.allocate("c", 2)  # evicts it
    assert (watch.lifetime_s.total, watch.idle_s.total, watch.reuse_gap_s.total) == (10.0, 4.0, 6.0)
    assert (count(watch.lifetime_s), count(watch.idle_s), count(watch.reuse_gap_s)) == (1, 1, 2)


def test_pages_that_are_freed_unnamed_are_not_evicted() -> None:
    watch = PageWatch(1.0, Clock())
    pages = PageManager(1, 4, watch=watch)
    for _ in range(3):
        pages.allocate("a", 1)
        pages.release("a")
    assert count(watch.lifetime_s) == 0


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_pages_is_watched(share: float) -> None:
    watch = PageWatch(share, Clock(), random.Random(3).random)
    for page in range(4000):
        watch.allocated(page)
        watch.evicted(page)
    assert count(watch.lifetime_s) == pytest.approx(4000 * share, rel=0.1)
