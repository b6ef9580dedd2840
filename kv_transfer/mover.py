"""`PageMover`: the one thread of a worker that posts and polls copies and computes checksums.

The engine thread hands in jobs (jobs.py), never blocks, and drains completions between two steps. Jobs advance in turn,
a batch at a time (work.py); a batch is verified while it is still in the
CPU's caches. An idle mover sleeps, waking only as often as a transport wants its `progress` called.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import Transport, TransportError
from penstock.kv_transfer.jobs import (
    Completion,
    ConnectFailed,
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
from penstock.kv_transfer.region import checksums
from penstock.kv_transfer.work import Read, Seal, Turns

__all__ = [
    "Completion",
    "ConnectFailed",
    "PageMover",
    "ReadDone",
    "ReadFailed",
    "ReadJob",
    "ReadMismatch",
    "ReadSettled",
    "ReadStalled",
    "SealJob",
    "Sealed",
]

_POLL_MIN_S, _POLL_MAX_S = 50e-6, 5e-3  # between two looks at copies in flight: 1/32 of the time nothing has moved
_IDLE_FACTOR = 10  # an idle mover calls `progress` this much less often
_CPU_BATCH_BYTES, _GPU_BATCH_BYTES = 8 << 20, 64 << 20  # at 13 MB/s a GPU's still lands before it counts as stalled
_GPU_SEAL_BYTES = 256 << 20  # a GPU's checksums take 0.2 ms to ask for, and 0.1 ms for so much
_QUICK_S = 2.0  # for how long after a command the mover does not count as idle


class PageMover:
    """Owns the transports from construction on. Methods may be called from any thread and return at once, except
    `close`; what they ask for happens in the mover's thread, in order. A peer is named by its incarnation."""

    def __init__(
        self,
        region: MemoryRegion,
        transports: Sequence[Transport],
        wake: Callable[[], None] = lambda: None,
        *,
        stall_s: float = 5.0,
        batch_bytes: int | None = None,
        checksum: Callable[[Sequence[int]], list[int]] | None = None,
    ) -> None:
        """Starts the thread.

        Args:
            wake: called in the mover's thread when completions are ready; must not block.
            stall_s: a read is reported as stalled when its link has been quiet for so long, or longer on a link that
                is known to be slow (link_pace.py).
            batch_bytes: how much of a job is posted, or hashed, at once; default: by where the pool is, and for reads
                what the transport wants.
            checksum: of our pages, as the lender seals them; needed for pools that are not on CPU.
        """
        self._transports = {transport.name: transport for transport in transports}
        self._wake = wake
        self._stall_s = stall_s
        on_cpu = region.device == "cpu"
        default_bytes = _CPU_BATCH_BYTES if on_cpu else _GPU_BATCH_BYTES
        self._batch_pages = max(1, (batch_bytes or default_bytes) // region.page_bytes)
        self._seal_pages = self._batch_pages if on_cpu else max(1, _GPU_SEAL_BYTES // region.page_bytes)
        self._by_default = batch_bytes is None
        self._page_bytes = region.page_bytes
        self._checksum = checksum or (lambda pages: checksums(region, pages))
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._done: deque[Completion] = deque()
        self._turns = Turns()
        self._connected: dict[tuple[str, str], bytes] = {}
        self._paces: dict[tuple[str, str], LinkPace] = {}  # of connected peers
        self._leaving: set[str] = set()
        self._quick_until = 0.0
        self._failure: BaseException | None = None
        self._close_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="page-mover", daemon=True)
        self._thread.start()

    @property
    def moved_bytes(self) -> int:
        """Read so far, out of whosever pool; grows with each batch, long before a slow read is done."""
        return self._turns.moved_bytes

    def connect(self, peer: str, transport: str, description: bytes) -> None:
        """Connect before any job handed in later. Success is silent, a failure is a `ConnectFailed`. Connecting again
        to the same pool changes nothing; after a lost connection (reads fail) `disconnect` first."""
        self._commands.put(lambda: self._connect(peer, transport, description))

    def disconnect(self, peer: str) -> None:
        """Cancel the peer's reads and, once none of its copies is in flight, forget it on all transports."""
        self._commands.put(lambda: self._disconnect(peer))

    def read(self, job: ReadJob) -> None:
        """Queue a read. Tags name jobs in progress: one of each."""
        self._commands.put(lambda: self._start_read(job))

    def cancel(self, tag: str) -> None:
        """Post nothing more of this job: a read ends in `ReadFailed` once settled, a seal without a word."""
        self._commands.put(lambda: self._turns.cancel(tag))

    def seal(self, job: SealJob) -> None:
        """Queue a checksum job; the pages must not change until it is done."""
        self._commands.put(lambda: self._turns.start(job.tag, Seal(job, self._seal_pages, self._checksum)))

    def expect_readers(self) -> None:
        """Peers read from us, or are about to: be quick to serve them for _QUICK_S. `seal` has this effect, too."""
        self._commands.put(lambda: None)

    def poll_done(self) -> list[Completion]:
        """Completions since the last call, in order.

        Raises:
            RuntimeError: the thread has died of a bug, which is the cause.
        """
        if self._failure is not None:
            raise RuntimeError("the mover's thread has died") from self._failure
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self, drain_s: float = 5.0) -> bool:
        """Cancel everything, wait up to drain_s for copies in flight, then close the transports and end the thread.

        Returns False when a copy is still in flight. Then the transports stay open, the pool must stay mapped, and the
        process has to leave by `os._exit`: a normal exit with a NIXL transfer in flight is a segmentation fault.
        """
        self._commands.put(lambda: self._close(drain_s))
        self._thread.join(drain_s + 1.0)
        return not self._thread.is_alive() and not self._turns and self._failure is None

    # ------------------------------------------------------------ in the mover's thread

    def _run(self) -> None:
        moved_at = time.monotonic()
        try:
            while self._close_at is None or (self._turns and time.monotonic() < self._close_at):
                self._take_commands(self._timeout(moved_at))
                for transport in self._transports.values():
                    transport.progress()
                if self._turns.advance(time.monotonic):
                    moved_at = time.monotonic()
                for completion in self._turns.completions():
                    self._report(completion)
                self._forget_leavers()
            if not self._turns:
                for transport in self._transports.values():
                    transport.close()
        except BaseException as failure:
            self._failure = failure
            self._wake()
            raise

    def _timeout(self, moved_at: float) -> float | None:
        """How long to wait for a command before having a look at the work or the transports."""
        now = time.monotonic()
        if self._turns:
            quiet_s = now - moved_at
            return 0.0 if quiet_s < _POLL_MIN_S else min(max(quiet_s / 32, _POLL_MIN_S), _POLL_MAX_S)
        wanted = [t.progress_s for t in self._transports.values() if t.progress_s is not None]
        if not wanted:
            return None
        return min(wanted) * (1 if now < self._quick_until else _IDLE_FACTOR)

    def _take_commands(self, timeout_s: float | None) -> None:
        """Wait for a command, then carry out all that are there."""
        try:
            while True:
                command = self._commands.get(timeout=timeout_s)
                command()
                self._quick_until = time.monotonic() + _QUICK_S
                timeout_s = 0.0
        except Empty:
            pass

    def _report(self, completion: Completion) -> None:
        self._done.append(completion)
        self._wake()

    def _start_read(self, job: ReadJob) -> None:
        transport = self._transports.get(job.transport)
        if transport is None or (job.peer, job.transport) not in self._connected or job.peer in self._leaving:
            self._report(ReadFailed(job.tag, f"{job.peer} is not connected over {job.transport}"))
        else:
            pace = self._paces.get((job.peer, job.transport))
            if pace is None:
                pace = self._paces[job.peer, job.transport] = self._first_pace(transport)
            self._turns.start(job.tag, Read(job, transport, pace, self._checksum))

    def _first_pace(self, transport: Transport) -> LinkPace:
        """Of a link that is not known yet: a page first, where it may be anything."""
        wanted = transport.batch_bytes if self._by_default else None
        most = max(1, wanted // self._page_bytes) if wanted else self._batch_pages
        careful = self._by_default and transport.unknown_link
        return LinkPace(most, 1 if careful else most, self._stall_s)

    def _connect(self, peer: str, name: str, description: bytes) -> None:
        if self._turns.reads_from(peer) and self._connected.get((peer, name)) == description:
            self._leaving.discard(peer)  # the same pool: its copies in flight go on
            return
        self._forget_leavers()
        if self._connected.get((peer, name)) == description:
            return
        try:
            if name not in self._transports:
                raise TransportError(f"transport {name} is not open here")
            if self._turns.reads_from(peer):
                raise TransportError(f"earlier reads from {peer} have not settled")
            self._transports[name].connect(peer, description)
        except TransportError as error:
            self._report(ConnectFailed(peer, name, str(error)))
        else:
            self._connected[peer, name] = description

    def _disconnect(self, peer: str) -> None:
        self._turns.cancel_all(peer)
        self._leaving.add(peer)
        for transport in self._transports.values():
            transport.sever(peer)

    def _forget_leavers(self) -> None:
        for peer in [peer for peer in self._leaving if not self._turns.reads_from(peer)]:
            self._leaving.discard(peer)
            for name, transport in self._transports.items():
                self._paces.pop((peer, name), None)
                if self._connected.pop((peer, name), None) is not None:
                    transport.disconnect(peer)

    def _close(self, drain_s: float) -> None:
        self._close_at = time.monotonic() + drain_s
        self._turns.cancel_all()
        for peer, name in self._connected:
            self._transports[name].sever(peer)
