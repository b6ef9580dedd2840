"""What a worker asks of `PageMover`, and what it hears back.

Every ReadJob ends in exactly one of ReadDone, ReadFailed, ReadMismatch or ReadStalled. Only after ReadStalled may its
pages still be written; ReadSettled then follows, perhaps much later. Every SealJob ends in Sealed,
unless it was cancelled. Jobs take turns: a short one may end before a long one that was handed in earlier. Those of one
`line` (tickets of one loan, say) go one behind the other: the first is done while the last has not begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReadJob:
    """Read the peer's page src_pages[i] onto our page dst_pages[i]; compare with checksums[i] unless that is []."""

    tag: str
    peer: str
    transport: str
    src_pages: Sequence[int]
    dst_pages: Sequence[int]
    checksums: Sequence[int] = ()
    line: str = ""  # "": in no line


@dataclass(frozen=True)
class SealJob:
    """Compute the checksums of our own pages, before they are lent."""

    tag: str
    pages: Sequence[int]
    line: str = ""  # "": in no line


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
    """Nothing has come for as long as the link is given: the read has failed, but its pages may still be written until
    `ReadSettled`."""

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
