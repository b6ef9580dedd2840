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
MOST_ITEMS = 128  # of a slice: a task that an item wakes runs behind it, and takes its time there

_T = TypeVar("_T")


class Slices(Generic[_T]):
    """Calls `do` for every item, in order, once the loop has handled what it is at; other callbacks run between slices.

    What `do` raises goes to the loop's exception handler, and costs no other item its turn.
    """

    def __init__(self, do: Callable[[_T], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._do, self._clock = do, clock
        self._due: deque[_T] = deque()
        self._awaited = False  # a slice will come

    def __len__(self) -> int:
        return len(self._due)

    def add(self, item: _T) -> None:
        """Do this, behind all others."""
        self._due.append(item)
        if not self._awaited:
            self._await_slice()

    def extend(self, items: Iterable[_T]) -> None:
        """Do these, in their order."""
        self._due.extend(items)
        if self._due and not self._awaited:
            self._await_slice()

    def _await_slice(self) -> None:
        self._awaited = True
        asyncio.get_running_loop().call_soon(self._slice)

    def _slice(self) -> None:
        due, do, clock = self._due, self._do, self._clock
        until, left = clock() + SLICE_S, MOST_ITEMS
        try:
            while due:
                do(due.popleft())
                left -= 1
                if not left or clock() >= until:
                    break
        finally:
            self._awaited = False
            if due:
                self._await_slice()
