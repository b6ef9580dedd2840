"""Work that comes in bursts, done in slices of the event loop's time.

A step of all workers brings a token for every running stream. Handled in one go, thousands of them would keep the loop
from everything else for as long; so what is to be delivered (service.py) and what is to be written (event_stream.py)
goes through here.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

SLICE_S = 0.002
LOOK_AFTER = 8  # items: then at the clock
MOST_ITEMS = 16 * LOOK_AFTER  # of a slice: a task that an item wakes runs behind it, and takes its time there

_T = TypeVar("_T")


class Slices(Generic[_T]):
    """Calls `do` for every item, in order; other callbacks of the loop run between slices.

    What `do` raises goes to the loop's exception handler or to who brought the item, and costs no other its turn.
    """

    def __init__(self, do: Callable[[_T], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._do, self._clock = do, clock
        self._due: deque[_T] = deque()
        self._awaited = False  # a slice will come, or is under way
        self._rests_since = float("-inf")  # the end of the last one

    def __len__(self) -> int:
        return len(self._due)

    def add(self, item: _T) -> None:
        """Do this behind all others, once the loop has handled what it is at."""
        self._due.append(item)
        if not self._awaited:
            self._awaited = True
            asyncio.get_running_loop().call_soon(self._slice)

    def extend(self, items: Iterable[_T]) -> None:
        """Do these behind all others, beginning at once unless a slice has just been."""
        self._due.extend(items)
        if self._awaited or not self._due:
            return
        self._awaited = True
        if self._clock() - self._rests_since > SLICE_S:
            self._slice()
        else:
            asyncio.get_running_loop().call_soon(self._slice)

    def _slice(self) -> None:
        due, do, clock = self._due, self._do, self._clock
        until, left = clock() + SLICE_S, MOST_ITEMS
        try:
            while due and left:
                for _ in range(min(LOOK_AFTER, len(due))):
                    do(due.popleft())
                left -= LOOK_AFTER
                if clock() >= until:
                    break
        finally:
            self._rests_since = clock()
            self._awaited = bool(due)
            if due:
                asyncio.get_running_loop().call_soon(self._slice)
