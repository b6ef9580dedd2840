"""The decode worker's side of a hand-off: tickets in, pages read into our pool, a request ready to decode out.

    admitted ── Prefill ──> tickets: bind our pages, read, verify ──> PrefillDone and all landed ──> ready
                                  └── failed, lost, refused, stalled, mismatched ──> ready with what did land

Either way the outcome is a `Ready` entry: the engine computes whatever tokens are missing. Pages that a stalled read
may still write go to quarantine until that read has settled.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from penstock.common.histogram import READ_BYTES, READ_PAGES, READ_SECONDS, Histogram
from penstock.common.messages import (
    Abort,
    GenerateRequest,
    PagesLanded,
    PagesReady,
    Prefill,
    PrefillDone,
    PrefillFailed,
    Spans,
    WorkerInfo,
)
from penstock.common.rate_estimator import RateEstimator
from penstock.decode_worker.admission import Entry
from penstock.decode_worker.prefill_links import PrefillLinks, PrefillLost
from penstock.engine.pages import NoRoom, PageManager
from penstock.engine.request import request_key
from penstock.kv_transfer.base import TransportError
from penstock.kv_transfer.leases import Landings, LandingState
from penstock.kv_transfer.mover import (
    Completion,
    ConnectFailed,
    PageMover,
    ReadDone,
    ReadFailed,
    ReadJob,
    ReadMismatch,
    ReadSettled,
    ReadStalled,
    Sealed,
)
from penstock.kv_transfer.select import choose, same_host

logger = logging.getLogger(__name__)
QUARANTINE = "quarantine"
ReadEvent = ReadDone | ReadFailed | ReadMismatch | ReadSettled | ReadStalled


@dataclass(frozen=True)
class Ready:
    """A hand-off has ended. `computed` tokens of the request are in its pages; `first` came from the prefill worker."""

    entry: Entry
    computed: int
    first: PrefillDone | None
    spans: Spans  # transfer figures only


@dataclass(eq=False)
class _HandOff:
    entry: Entry
    worker: WorkerInfo
    transport: str = ""
    first: PrefillDone | None = None
    failed: str = ""
    ticketed_tokens: int = 0
    first_ticket_at: float | None = None
    done_at: float | None = None
    landed_at: float = 0.0
    size_bytes: int = 0
    num_pages: int = 0
    mismatches: int = 0


@dataclass
class HandOffCounters:
    """Since the start of the worker."""

    handoffs: int = 0
    handoff_failures: int = 0
    transfer_bytes: int = 0
    transfer_pages: int = 0
    checksum_failures: int = 0
    asked_tokens: int = 0
    received_tokens: int = 0
    read_s: Histogram = field(default_factory=lambda: Histogram(READ_SECONDS))
    read_bytes: Histogram = field(default_factory=lambda: Histogram(READ_BYTES))
    read_pages: Histogram = field(default_factory=lambda: Histogram(READ_PAGES))

    def read(self, seconds: float, size_bytes: int, num_pages: int) -> None:
        """A ticket's pages have arrived."""
        self.transfer_bytes += size_bytes
        self.read_s.observe(seconds)
        self.read_bytes.observe(size_bytes)
        self.read_pages.observe(num_pages)

    def histograms(self) -> dict[str, list[float]]:
        """As they travel in `WorkerLoad`."""
        return {name: getattr(self, name).packed() for name in ("read_s", "read_bytes", "read_pages")}


@dataclass
class HandOffIn:
    """All hand-offs that come in. Used from the worker's loop thread; copying is the mover's."""

    pages: PageManager
    mover: PageMover
    links: PrefillLinks
    landings: Landings
    own_transports: list[str]
    kv_transport: str  # as configured: "auto" or one name
    rates: RateEstimator = field(default_factory=RateEstimator)  # is told how long reads take
    counters: HandOffCounters = field(default_factory=HandOffCounters)
    _open: dict[str, _HandOff] = field(default_factory=dict)
    _peers: dict[str, str] = field(default_factory=dict)  # prefill incarnation -> transport it is read with
    _unreadable: dict[str, str] = field(default_factory=dict)  # prefill incarnation -> why there is no transport
    _found: dict[str, WorkerInfo] = field(default_factory=dict)
    _refused: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # by incarnation: transport -> why it did not open
    _reads: dict[str, str] = field(default_factory=dict)  # tag of a read that may still write -> its hand-off's key
    _ready: list[Ready] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def settled(self) -> bool:
        """No hand-off is open and no read may still write."""
        return not self._open and not self._reads

    @property
    def quarantined_pages(self) -> int:
        return len(self.pages.table(QUARANTINE))

    # ------------------------------------------------------------ begin and end

    def begin(self, entry: Entry, worker: WorkerInfo, router_id: str, now: float) -> None:
        """Ask the prefill worker for the pages that are not held here yet."""
        self.counters.handoffs += 1
        self.counters.asked_tokens += entry.num_tokens - entry.held_tokens
        self._open[entry.key] = _HandOff(entry, worker)
        held_pages = entry.held_tokens // self.pages.page_size
        self.landings.promise(entry.key, held_pages, self.pages.pages_for(entry.num_tokens) - held_pages)
        if worker.incarnation in self._unreadable:
            self._fail(self._open[entry.key], self._unreadable[worker.incarnation])
            return
        message = Prefill(request=entry.request, router_id=router_id, held_tokens=entry.held_tokens)
        self.links.send(worker, message, now)

    def cancel(self, key: str) -> Entry | None:
        """The client is gone: end the hand-off on both sides, free its pages. None if there is no such hand-off."""
        handoff = self._open.get(key)
        if handoff is None:
            return None
        self._abort(handoff)
        self._settle(handoff)
        self.pages.release(key)
        return handoff.entry

    def take_ready(self) -> list[Ready]:
        """Hand-offs that have ended since the last call."""
        ready, self._ready = self._ready, []
        return ready

    # ------------------------------------------------------------ from the prefill worker

    def found(self, worker: WorkerInfo) -> None:
        """Handshake done: choose the transport, of those that have not been refused, and connect it."""
        self._found[worker.incarnation] = worker
        refused = self._refused.get(worker.incarnation, {})
        offered = {n: d for n, d in worker.transports.items() if self.kv_transport in ("auto", n) and n not in refused}
        try:
            transport = choose(self.own_transports, offered, same_host(worker.transports))
        except TransportError as error:
            reason = "; ".join(f"{name}: {why}" for name, why in refused.items()) or str(error)
            self._unreadable[worker.incarnation] = reason
            self._fail_all(worker.incarnation, reason)
            return
        self._peers[worker.incarnation] = transport
        self.mover.connect(worker.incarnation, transport, worker.transports[transport])
        logger.info("reading pages of %s over %s", worker.worker_id, transport)

    def lost(self, event: PrefillLost) -> None:
        """The prefill worker is gone: what has landed is kept, the rest is computed here."""
        self._fail_all(event.incarnation, event.reason)
        self._unreadable.pop(event.incarnation, None)
        self._found.pop(event.incarnation, None)
        self._refused.pop(event.incarnation, None)
        if self._peers.pop(event.incarnation, None) is not None:
            self.mover.disconnect(event.incarnation)

    def ticket(self, incarnation: str, message: PagesReady, now: float) -> None:
        """Bind our pages to a ticket and read; duplicate, late and unknown tickets change nothing."""
        key = request_key(message.request_id, message.choice, message.attempt)
        handoff = self._open.get(key)
        pages = message.pages[0]
        if handoff is None or handoff.worker.incarnation != incarnation:
            self.links.send_if_linked(incarnation, _landed(message))
            return
        transport = self._peers.get(incarnation)
        if handoff.failed or transport is None or not self.landings.accepts(key, message.first_page, len(pages)):
            return
        try:
            bound = self.pages.allocate(key, len(pages))
        except NoRoom as error:  # more pages than were promised
            self._fail(handoff, str(error))
            return
        handoff.transport = transport
        handoff.ticketed_tokens = message.num_tokens
        handoff.first_ticket_at = now if handoff.first_ticket_at is None else handoff.first_ticket_at
        lent_at = self.links.lent_at(incarnation, message.heartbeat_seq)
        tag = self.landings.start(key, message.first_page, bound, lent_at)
        self._reads[tag] = key
        checksums = message.checksums[0] if message.checksums else []
        self.mover.read(ReadJob(tag, incarnation, handoff.transport, tuple(pages), tuple(bound), tuple(checksums)))

    def prefill_done(self, message: PrefillDone, now: float) -> None:
        handoff = self._open.get(request_key(message.request_id, message.choice, message.attempt))
        if handoff is None:
            return
        handoff.first = message
        handoff.done_at = now
        if handoff.failed == "":
            if message.finish is not None:
                self._abort(handoff)  # ended with its first token: the pages are not needed
            else:
                self.landings.complete(handoff.entry.key)
        self._try_end(handoff)

    def prefill_failed(self, message: PrefillFailed) -> None:
        handoff = self._open.get(request_key(message.request_id, message.choice, message.attempt))
        if handoff is not None:
            self._fail(handoff, f"{message.code}: {message.message}")

    # ------------------------------------------------------------ from the mover

    def completed(self, event: Completion, now: float) -> None:
        """A read of ours ended, stalled or settled."""
        if isinstance(event, ConnectFailed):
            self._fail_all(event.peer, f"{event.transport}: {event.reason}")
            self._peers.pop(event.peer, None)
            self._refused.setdefault(event.peer, {})[event.transport] = event.reason
            if event.peer in self._found:  # later hand-offs may come over another
                self.found(self._found[event.peer])
        elif not isinstance(event, Sealed):
            key = self._reads[event.tag]
            if not isinstance(event, ReadStalled):
                del self._reads[event.tag]
            handoff = self._open.get(key)
            if handoff is not None:
                self._read_event(handoff, event)
            elif not isinstance(event, ReadStalled):  # of a hand-off that was given up: its pages leave quarantine
                self.pages.release_some(QUARANTINE, self.landings.read_ended(event.tag))

    def _read_event(self, handoff: _HandOff, event: ReadEvent) -> None:
        reason = ""
        if isinstance(event, ReadDone):
            handoff.landed_at = event.finished_at
            handoff.size_bytes += event.size_bytes
            self.rates.read(event.size_bytes, event.seconds)
            self.counters.read(event.seconds, event.size_bytes, event.size_bytes // handoff.worker.page_bytes)
            self.landings.read_done(event.tag, event.finished_at)
            if self.landings.state(handoff.entry.key) is LandingState.FAILED:
                reason = "pages landed after the lender's lease may have ended"
        elif isinstance(event, ReadStalled):
            self.landings.read_stalled(event.tag)
            reason = f"no progress for {event.seconds:.1f} s"
        else:
            self.landings.read_ended(event.tag)
            if isinstance(event, ReadMismatch):
                self.counters.checksum_failures += len(event.pages)
                handoff.mismatches += len(event.pages)
                reason = f"checksums of {len(event.pages)} pages differ"
            else:
                reason = event.reason if isinstance(event, ReadFailed) else "the read was given up"
        if reason:
            self._fail(handoff, reason)
        else:
            self._try_end(handoff)

    # ------------------------------------------------------------ inside

    def _fail_all(self, incarnation: str, reason: str) -> None:
        for handoff in [h for h in self._open.values() if h.worker.incarnation == incarnation]:
            self._fail(handoff, reason)

    def _fail(self, handoff: _HandOff, reason: str) -> None:
        if not handoff.failed:
            handoff.failed = reason
            self.counters.handoff_failures += 1
            logger.warning(
                "hand-off failed, computing the rest here: %s",
                reason,
                extra={"request_id": handoff.entry.request.request_id},
            )
            self._abort(handoff)
        self._try_end(handoff)

    def _abort(self, handoff: _HandOff) -> None:
        """Tell the prefill worker to stop and forget; reads under way are cut short."""
        request = handoff.entry.request
        abort = Abort(request_id=request.request_id, attempt=request.attempt, choice=request.choice)
        self.links.send_if_linked(handoff.worker.incarnation, abort)
        for tag, key in self._reads.items():
            if key == handoff.entry.key:
                self.mover.cancel(tag)
        self.landings.fail(handoff.entry.key)

    def _try_end(self, handoff: _HandOff) -> None:
        """A landed hand-off is over. A failed one is over once nothing is being read, or only reads that stalled."""
        if self.landings.state(handoff.entry.key) not in (LandingState.LANDED, LandingState.FAILED):
            return
        computed = self._settle(handoff)
        request = handoff.entry.request
        self.links.send_if_linked(handoff.worker.incarnation, _landed(request))
        self._ready.append(Ready(handoff.entry, computed, handoff.first, self._spans(handoff)))

    def _settle(self, handoff: _HandOff) -> int:
        """Close the books of a hand-off: keep the leading landed pages, free or quarantine the rest. Tokens kept."""
        key = handoff.entry.key
        outcome = self.landings.take(key)
        del self._open[key]
        if outcome.idle:  # their contents are unknown; the engine will need as many, so they stay promised
            self.pages.release_some(key, outcome.idle)
            self.pages.promise(key, len(outcome.idle))
        if outcome.quarantined:
            self.pages.move(key, QUARANTINE, outcome.quarantined)
        size = self.pages.page_size
        tokens = min(handoff.entry.held_tokens + len(outcome.landed) * size, handoff.ticketed_tokens)
        tokens = max(tokens, handoff.entry.held_tokens)
        handoff.num_pages = len(outcome.landed)
        self.counters.received_tokens += tokens - handoff.entry.held_tokens
        self.counters.transfer_pages += len(outcome.landed)
        table = self.pages.table(key)
        for index in range(handoff.entry.held_tokens // size, min(tokens // size, len(handoff.entry.hashes))):
            hashes = handoff.entry.hashes
            self.pages.name(table[index], hashes[index], hashes[index - 1] if index else b"")
        return tokens

    def _spans(self, handoff: _HandOff) -> Spans:
        began, landed = handoff.first_ticket_at, handoff.landed_at
        exposed_from = handoff.done_at if handoff.done_at is not None else landed
        return Spans(
            transfer_ms=max(0.0, landed - began) * 1e3 if began is not None else 0.0,
            exposed_transfer_ms=max(0.0, landed - exposed_from) * 1e3,
            transfer_bytes=handoff.size_bytes,
            transfer_pages=handoff.num_pages,
            transport=handoff.transport,
            checksum_failures=handoff.mismatches,
            local_prefill=bool(handoff.failed),
        )


def _landed(source: GenerateRequest | PagesReady) -> PagesLanded:
    return PagesLanded(request_id=source.request_id, attempt=source.attempt, choice=source.choice)
