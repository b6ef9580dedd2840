"""The interface of a transport: how a worker reads KV pages out of another worker's pool.

Pages are pulled: the reader (a decode worker) posts copies from the lender's pool (a prefill worker) into its own, so
every write into a page comes from the process that owns it, and the state of our own copy is proof enough that no
writer is left. `PageMover` is the only caller: a transport belongs to one thread and none of its calls are thread-safe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from enum import Enum


class TransportError(Exception):
    """A transport cannot be opened, a peer cannot be reached, or a copy is impossible; nothing was written."""


class CopyState(Enum):
    """PENDING may still write; DONE and FAILED are settled: nothing will write into the pages any more."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Copy:
    """One posted copy. Transports keep what they need in a subclass; `reason` is set when it failed."""

    def __init__(self, peer: str, size_bytes: int) -> None:
        self.peer = peer
        self.size_bytes = size_bytes
        self.reason = ""


class Transport(ABC):
    """Copies pages from peers' pools into the pool it was opened with (`MemoryRegion`, which must outlive it)."""

    name: str
    progress_s: float | None = None  # how often `progress` must be called for peers to read from us; None: never

    batch_bytes: int | None = None  # how much of a read is posted at once; None: the mover's own measure
    unknown_link = False  # a network, of any speed: a page first

    @abstractmethod
    def progress(self) -> None:
        """Serve peers that connect to us or read our pages, as far as that needs our help. Does not block."""

    @abstractmethod
    def description(self) -> bytes:
        """How a peer reads our pages; valid until `close`. Travels in `WorkerInfo.transports`. No side effects."""

    @abstractmethod
    def connect(self, peer: str, description: bytes) -> None:
        """Make `peer`'s pool readable. Maps or registers memory, starts no thread; a connected peer is replaced.

        Raises:
            TransportError: not reachable, gone, or its pages are not of our size; nothing is left behind.
        """

    @abstractmethod
    def disconnect(self, peer: str) -> None:
        """Forget `peer`; unknown peers are ignored. Its copies must be settled before."""

    @abstractmethod
    def post(self, peer: str, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Copy:
        """Begin copying the peer's page src_pages[i] onto our page dst_pages[i], for all i.

        May do the whole copy before it returns, without holding the interpreter lock. From here on the destination
        pages may be written, until `poll` says otherwise.

        Raises:
            TransportError: unknown peer or page, or lists of different length; nothing is or will be written.
        """

    @abstractmethod
    def poll(self, copy: Copy) -> CopyState:
        """How the copy stands, without blocking. Once settled the answer never changes."""

    def sever(self, peer: str) -> None:
        """Settle the peer's copies now, done or failed, if that is possible. Where it is not they settle in time."""
        return

    @abstractmethod
    def close(self) -> None:
        """Give everything back: mappings, registrations, threads. All copies must be settled before."""


def runs(src_pages: Sequence[int], dst_pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Pieces (first source page, first destination page, number of pages) that are adjacent on both sides."""
    start = 0
    for i in range(1, len(src_pages) + 1):
        if i == len(src_pages) or src_pages[i] != src_pages[i - 1] + 1 or dst_pages[i] != dst_pages[i - 1] + 1:
            yield src_pages[start], dst_pages[start], i - start
            start = i


def check_pages(src_pages: Sequence[int], src_limit: int, dst_pages: Sequence[int], dst_limit: int) -> None:
    """Raise TransportError unless both lists are equally long and hold page ids below their pool's size."""
    if len(src_pages) != len(dst_pages):
        raise TransportError(f"{len(src_pages)} source pages for {len(dst_pages)} destination pages")
    for pages, limit, whose in ((src_pages, src_limit, "peer's"), (dst_pages, dst_limit, "own")):
        if pages and (min(pages) < 0 or max(pages) >= limit):
            raise TransportError(f"page id out of range: the {whose} pool has {limit} pages")
