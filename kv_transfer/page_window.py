"""Pages as memory that sockets can read and write: the pool itself on CPU, pinned host memory beside one on a GPU.

Used by tcp.py and page_server.py; a connection at either end has one of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.region import page_array

_MOST_VIEWS = 256  # of one call; the system allows 1024
_STAGED_BYTES = 8 << 20


class PageWindow(ABC):
    """Up to `num_pages` pages at a time. `staged`: they are somewhere else meanwhile, and are loaded and stored."""

    staged = False

    def __init__(self, page_bytes: int, num_pages: int) -> None:
        self.page_bytes = page_bytes
        self.num_pages = num_pages

    @abstractmethod
    def views(self, pages: Sequence[int], skip: int) -> list[memoryview]:
        """The bytes of these pages, in order, without the first `skip`, which are fewer than there are."""

    @abstractmethod
    def load(self, pages: Sequence[int]) -> None:
        """Have the pages' bytes in the window; returns when they are."""

    @abstractmethod
    def store(self, pages: Sequence[int]) -> None:
        """Write the window's first pages to where they belong; returns when they are there."""

    @abstractmethod
    def close(self) -> None:
        """Drop what refers to memory."""


def open_window(region: MemoryRegion) -> PageWindow:
    """A window on the region.

    Raises:
        TransportError: its device cannot be used here.
    """
    if region.device == "cpu":
        return _PoolWindow(region)
    from penstock.kv_transfer.staged_window import StagedWindow  # with torch, which CPU workers' mover does not need

    return StagedWindow(region, max(1, _STAGED_BYTES // region.page_bytes))


class _PoolWindow(PageWindow):
    """The pool's own memory."""

    def __init__(self, region: MemoryRegion) -> None:
        super().__init__(region.page_bytes, _MOST_VIEWS)
        self._memory = page_array(region).reshape(-1).data

    def views(self, pages: Sequence[int], skip: int) -> list[memoryview]:
        size = self.page_bytes
        first, rest = divmod(skip, size)
        found = [self._memory[page * size : (page + 1) * size] for page in pages[first:]]
        found[0] = found[0][rest:]
        return found

    def load(self, pages: Sequence[int]) -> None:
        """They are."""

    def store(self, pages: Sequence[int]) -> None:
        """They are."""

    def close(self) -> None:
        self._memory.release()
