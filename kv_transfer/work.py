"""Jobs in the mover's hands: `Read` and `Seal` advance by one batch at a time, `Turns` says whose turn it is.

No threads of their own: `PageMover` calls, with its clock (time.monotonic in production).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
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
from penstock.kv_transfer.link_pace import LinkPace

Checksum = Callable[[Sequence[int]], list[int]]
Clock = Callable[[], float]


class Work(ABC):
    """One job. `ended`: it needs no more turns and nothing of it is in flight."""

    peer = ""
    abreast = 1  # how many of a line are under way at once

    def __init__(self, line: str) -> None:
        self.line = line
        self.ended = False
        self.moved_bytes = 0  # that have come out of the peer's pool so far
        self._said: list[Completion] = []

    @abstractmethod
    def advance(self, clock: Clock) -> bool:
        """Do one batch, or look after the one in flight; whether anything happened."""

    @abstractmethod
    def cancel(self) -> None:
        """Begin nothing more: ended, unless something is in flight."""

    def completions(self) -> list[Completion]:
        """What there is to report, once."""
        said, self._said = self._said, []
        return said

    def _end(self, completion: Completion) -> None:
        self._said.append(completion)
        self.ended = True


class Read(Work):
    """Batches of a ReadJob: posted, polled, verified, one after the other."""

    abreast = 2  # one is copied while the other is verified

    def __init__(self, job: ReadJob, transport: Transport, pace: LinkPace, checksum: Checksum) -> None:
        super().__init__(job.line)
        self.peer = job.peer
        self._job = job
        self._transport = transport
        self._pace = pace
        self._checksum = checksum
        self._batch = slice(0, 0)  # the one in flight, or the last one, of the job's lists
        self._copy: Copy | None = None
        self._started_at: float | None = None
        self._posted_at = 0.0
        self._mismatched: list[int] = []
        self._failure = ""
        self._stalled = False

    def cancel(self) -> None:
        self._failure = self._failure or "cancelled"
        if self._copy is None and not self.ended:
            self._end(ReadFailed(self._job.tag, self._failure))

    def advance(self, clock: Clock) -> bool:
        if self._copy is None:
            return self._post(clock())
        state = self._transport.poll(self._copy)
        now = clock()  # read after the poll: what has landed had landed by then
        if state is CopyState.PENDING:
            self._watch(now)
            return False
        seconds, pages = now - self._posted_at, self._batch.stop - self._batch.start
        if state is CopyState.FAILED:
            self._failure = self._failure or self._copy.reason or "the transport failed"
            if not self._stalled:
                self._pace.failed()
        elif self._stalled:
            self._pace.came_late(seconds, pages, now)
        else:
            self._pace.arrived(seconds, pages, now)
            if not self._failure:
                self._verify()
        if state is CopyState.DONE:
            self.moved_bytes += self._copy.size_bytes
        self._copy = None
        if self._failure or self._batch.stop >= len(self._job.dst_pages):
            self._finish(now)
        return True

    def _post(self, now: float) -> bool:
        """Begin the next batch, or end; False if others have to come first."""
        job, start = self._job, self._batch.stop
        batch = slice(start, min(start + self._pace.pages, len(job.dst_pages)))
        self._failure = self._failure or self._objection(now)
        if not self._failure and job.dst_pages[batch]:
            if not self._pace.has_room:
                return False
            try:
                self._copy = self._transport.post(job.peer, job.src_pages[batch], job.dst_pages[batch])
            except TransportError as error:
                self._failure = str(error)
        if self._copy is None:
            self._finish(now)
            return True
        self._pace.posted()
        self._batch, self._posted_at = batch, now
        if self._started_at is None:
            self._started_at = now
        return True

    def _objection(self, now: float) -> str:
        job = self._job
        if len(job.src_pages) != len(job.dst_pages) or len(job.checksums) not in (0, len(job.dst_pages)):
            return "source, destination and checksums differ in length"
        return "its link has stalled" if self._pace.is_dead(now) else ""

    def _verify(self) -> None:
        """Compare the batch that just landed with what the lender sealed."""
        batch = self._batch
        pages, expected = self._job.dst_pages[batch], self._job.checksums[batch]
        if expected:
            found = self._checksum(pages)
            self._mismatched += [p for p, want, have in zip(pages, expected, found, strict=True) if want != have]

    def _watch(self, now: float) -> None:
        pages = self._batch.stop - self._batch.start
        if not self._stalled and self._pace.stalled(self._posted_at, pages, now):
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
            self._end(ReadDone(tag, self.moved_bytes, seconds, finished_at=now))


class Seal(Work):
    """Batches of a SealJob."""

    def __init__(self, job: SealJob, batch_pages: int, checksum: Checksum) -> None:
        super().__init__(job.line)
        self._job = job
        self._batch_pages = batch_pages
        self._checksum = checksum
        self._checksums: list[int] = []

    def cancel(self) -> None:
        self.ended = True

    def advance(self, clock: Clock) -> bool:
        done = len(self._checksums)
        self._checksums += self._checksum(self._job.pages[done : done + self._batch_pages])
        if len(self._checksums) == len(self._job.pages):
            self._end(Sealed(self._job.tag, self._checksums))
        return True


class Turns:
    """All jobs of a mover. Each advances by a batch in turn, so that a long one does not hold up a short one; but those
    of one line go one behind the other, in the order in which they came."""

    def __init__(self) -> None:
        self.moved_bytes = 0  # of all jobs there have been
        self._work: dict[str, Work] = {}  # by tag
        self._said: list[Completion] = []

    def __len__(self) -> int:
        return len(self._work)

    def start(self, tag: str, work: Work) -> None:
        """Take a job in. Raises ValueError if one of this name is in progress."""
        if tag in self._work:
            raise ValueError(f"a job named {tag} is in progress")
        self._work[tag] = work

    def reads_from(self, peer: str) -> bool:
        """Whether something may still be written out of this peer's pool."""
        return any(work.peer == peer for work in self._work.values())

    def cancel(self, tag: str) -> None:
        """Cancel one job; unknown ones are ignored."""
        work = self._work.get(tag)
        if work is not None:
            work.cancel()
            self._collect(tag, work)

    def cancel_all(self, peer: str | None = None) -> None:
        """Cancel every job, or those that read from this peer."""
        for tag in [tag for tag, work in self._work.items() if peer in (None, work.peer)]:
            self.cancel(tag)

    def advance(self, clock: Clock) -> bool:
        """Give every job that is at the front of its line a turn; whether anything happened."""
        moved = False
        under_way: Counter[str] = Counter()
        for tag, work in list(self._work.items()):
            if work.line:
                under_way[work.line] += 1
                if under_way[work.line] > work.abreast:
                    continue
            before = work.moved_bytes
            moved |= work.advance(clock)
            self.moved_bytes += work.moved_bytes - before
            self._collect(tag, work)
        return moved

    def completions(self) -> list[Completion]:
        """What there is to report, once."""
        said, self._said = self._said, []
        return said

    def _collect(self, tag: str, work: Work) -> None:
        self._said += work.completions()
        if work.ended:
            del self._work[tag]
