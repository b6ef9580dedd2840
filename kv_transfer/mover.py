"""`PageMover`: the one thread of a worker that posts and polls copies and computes checksums.

The engine thread hands in jobs, never blocks, and drains completions between two steps; `wake` is called (in the
mover's thread) whenever one is ready. Every read job ends in exactly one of `ReadDone`, `ReadFailed`, `ReadMismatch`
or `ReadStalled`; only after `ReadStalled` may its pages still be written, until `ReadSettled` follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import Transport


@dataclass(frozen=True)
class ReadJob:
    """Read the peer's page src_pages[i] onto our page dst_pages[i]; compare with checksums[i] unless that is []."""

    tag: str
    peer: str
    transport: str
    src_pages: Sequence[int]
    dst_pages: Sequence[int]
    checksums: Sequence[int] = field(default=())


@dataclass(frozen=True)
class SealJob:
    """Compute the checksums of our own pages, before they are lent."""

    tag: str
    pages: Sequence[int]


@dataclass(frozen=True)
class ReadDone:
    """All pages arrived (and matched). `finished_at` is time.monotonic() when the last byte had landed."""

    tag: str
    size_bytes: int
    seconds: float  # from the first post to the last byte; waiting behind other jobs is not in it
    finished_at: float


@dataclass(frozen=True)
class ReadFailed:
    """The read ended without all pages; nothing writes into them any more."""

    tag: str
    reason: str


@dataclass(frozen=True)
class ReadMismatch:
    """Everything arrived, but the bytes of these destination pages are not what the lender sealed. Settled."""

    tag: str
    pages: list[int]


@dataclass(frozen=True)
class ReadStalled:
    """No progress for stall_s: the read has failed, but its pages may still be written until `ReadSettled`."""

    tag: str
    seconds: float


@dataclass(frozen=True)
class ReadSettled:
    """Follows `ReadStalled`, perhaps much later: nothing writes into the pages any more."""

    tag: str


@dataclass(frozen=True)
class Sealed:
    """Checksums of a SealJob's pages, in its order."""

    tag: str
    checksums: list[int]


@dataclass(frozen=True)
class ConnectFailed:
    """The peer cannot be read over this transport; reads posted to it fail, too."""

    peer: str
    transport: str
    reason: str


Completion = ReadDone | ReadFailed | ReadMismatch | ReadStalled | ReadSettled | Sealed | ConnectFailed


class PageMover:
    """Owns the transports from construction on. All methods return at once, except `close`."""

    def __init__(
        self,
        region: MemoryRegion,
        transports: Sequence[Transport],
        wake: Callable[[], None] = lambda: None,
        stall_s: float = 5.0,
        batch_bytes: int = 8 << 20,
    ) -> None:
        raise NotImplementedError

    def connect(self, peer: str, transport: str, description: bytes) -> None:
        """Connect in the mover's thread, before any job handed in later; a failure is a `ConnectFailed`."""
        raise NotImplementedError

    def disconnect(self, peer: str) -> None:
        """Cancel the peer's reads and, once they are settled, forget it on all transports."""
        raise NotImplementedError

    def read(self, job: ReadJob) -> None:
        """Queue a read; jobs in progress share the thread in turn."""
        raise NotImplementedError

    def cancel(self, tag: str) -> None:
        """Post nothing more of this read; it ends in `ReadFailed` once settled. Unknown tags are ignored."""
        raise NotImplementedError

    def seal(self, job: SealJob) -> None:
        """Queue a checksum job."""
        raise NotImplementedError

    def poll_done(self) -> list[Completion]:
        """Completions since the last call, in order."""
        raise NotImplementedError

    def close(self, drain_s: float = 5.0) -> bool:
        """Cancel what is queued, wait up to drain_s for copies in flight, then close transports and thread.

        Returns False when a copy is still in flight: transports stay open, the pool must not be unmapped, and the
        process has to leave by `os._exit` (a normal exit with a NIXL transfer in flight is a segmentation fault).
        """
        raise NotImplementedError
