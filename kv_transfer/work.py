"""A job in the mover's hands: `Read` and `Seal` advance by one batch at a time and say what came of it.

No threads of their own: `PageMover` gives them their turns, and its clock (time.monotonic in production).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from penstock.kv_transfer.base import Copy, CopyState, Transport, TransportError
from penstock.kv_transfer.jobs import (
    Completion,
    ReadDone,
    ReadFailed,
    ReadJob,
    ReadMismatch,
    ReadSettled,
    ReadStalled,
    Sealed,
    SealJob,
)

Checksum = Callable[[Sequence[int]], list[int]]
Clock = Callable[[], float]


class BatchSize:
    """How many pages of one peer are posted at once: so many that the link says often how it gets on.

    A copy tells nothing before all of it is there, so a slow link would look dead in the middle of a large batch. A
    batch that took longer than `SLOW_S` is followed by one of half the size, one that took less than `QUICK_S` by one
    of twice the size; at one page a read stalls only on links slower than a page in `stall_s`.
    """

    SLOW_S, QUICK_S = 0.5, 0.1

    def __init__(self, most_pages: int, first_pages: int) -> None:
        self._most = most_pages
        self.pages = max(1, min(first_pages, most_pages))

    def took(self, seconds: float, pages: int) -> None:
        """A batch of so many pages has settled."""
        if seconds > self.SLOW_S:
            self.pages = max(1, pages // 2)
        elif seconds < self.QUICK_S and pages == self.pages:  # a read's last batch may be short
            self.pages = min(self._most, 2 * self.pages)


class Work(ABC):
    """One job. `ended`: it needs no more turns and nothing of it is in flight."""

    peer = ""

    def __init__(self) -> None:
        self.ended = False
        self._said: list[Completion] = []

    @abstractmethod
    def advance(self, clock: Clock) -> bool:
        """Do one batch, or look after the one in flight; whether anything happened."""

    @abstractmethod
    def cancel(self) -> None:
        """Begin nothing more."""

    def completions(self) -> list[Completion]:
        """What there is to report, once."""
        said, self._said = self._said, []
        return said

    def _end(self, completion: Completion) -> None:
        self._said.append(completion)
        self.ended = True


class Read(Work):
    """Batches of a ReadJob: posted, polled, verified, one after the other."""

    def __init__(self, job: ReadJob, transport: Transport, size: BatchSize, checksum: Checksum, stall_s: float) -> None:
        super().__init__()
        self.peer = job.peer
        self._job = job
        self._transport = transport
        self._size = size
        self._checksum = checksum
        self._stall_s = stall_s
        self._batch = slice(0, 0)  # the one in flight, or the last one, of the job's lists
        self._copy: Copy | None = None
        self._started_at: float | None = None
        self._posted_at = 0.0
        self._size_bytes = 0
        self._mismatched: list[int] = []
        self._failure = ""
        self._stalled = False

    def cancel(self) -> None:
        self._failure = self._failure or "cancelled"

    def advance(self, clock: Clock) -> bool:
        if self._copy is None:
            self._post(clock())
            return True
        state = self._transport.poll(self._copy)
        now = clock()  # read after the poll: what has landed had landed by then
        if state is CopyState.PENDING:
            self._watch(now)
            return False
        if state is CopyState.FAILED:
            self._failure = self._failure or self._copy.reason or "the transport failed"
        elif not self._failure:
            self._verify()
            self._size_bytes += self._copy.size_bytes
        self._copy = None
        self._size.took(now - self._posted_at, self._batch.stop - self._batch.start)
        if self._failure or self._batch.stop >= len(self._job.dst_pages):
            self._finish(now)
        return True

    def _post(self, now: float) -> None:
        """Begin the next batch."""
        job = self._job
        if self._started_at is None:
            self._started_at = now
            if len(job.src_pages) != len(job.dst_pages) or len(job.checksums) not in (0, len(job.dst_pages)):
                self._failure = self._failure or "source, destination and checksums differ in length"
        start = self._batch.stop
        batch = self._batch = slice(start, min(start + self._size.pages, len(job.dst_pages)))
        if not self._failure and job.dst_pages[batch]:
            try:
                self._copy = self._transport.post(job.peer, job.src_pages[batch], job.dst_pages[batch])
            except TransportError as error:
                self._failure = str(error)
        if self._copy is None:
            self._finish(now)
        self._posted_at = now

    def _verify(self) -> None:
        """Compare the batch that just landed with what the lender sealed."""
        batch = self._batch
        pages, expected = self._job.dst_pages[batch], self._job.checksums[batch]
        if expected:
            found = self._checksum(pages)
            self._mismatched += [p for p, want, have in zip(pages, expected, found, strict=True) if want != have]

    def _watch(self, now: float) -> None:
        if not self._stalled and now - self._posted_at >= self._stall_s:
            self._stalled = True
            self._failure = self._failure or "stalled"
            self._said.append(ReadStalled(self._job.tag, now - self._posted_at))

    def _finish(self, now: float) -> None:
        tag = self._job.tag
        if self._stalled:
            self._end(ReadSettled(tag))
        elif self._failure:
            self._end(ReadFailed(tag, self._failure))
        elif self._mismatched:
            self._end(ReadMismatch(tag, self._mismatched))
        else:
            seconds = now - self._started_at if self._started_at is not None else 0.0
            self._end(ReadDone(tag, self._size_bytes, seconds, finished_at=now))


class Seal(Work):
    """Batches of a SealJob."""

    def __init__(self, job: SealJob, batch_pages: int, checksum: Checksum) -> None:
        super().__init__()
        self._job = job
        self._batch_pages = batch_pages
        self._checksum = checksum
        self._checksums: list[int] = []

    def cancel(self) -> None:
        self.ended = True

    def advance(self, clock: Clock) -> bool:
        if self.ended:
            return False
        done = len(self._checksums)
        self._checksums += self._checksum(self._job.pages[done : done + self._batch_pages])
        if len(self._checksums) == len(self._job.pages):
            self._end(Sealed(self._job.tag, self._checksums))
        return True
