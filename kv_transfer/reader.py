"""The reader's side of pages that move: tickets in, pages read into our pool, verified, and the lender told.

    begin ── Prefill or Fetch ──> tickets: bind our pages, read, verify ──> Prefill-/FetchDone, all landed ──> Read
                                      └── failed, lost, refused, stalled, mismatched, too slow ──> Read: what did land

A hand-off (a prefill worker computes the prompt for us) and a fetch (a worker lends what it caches) differ in what asks
for them and in what ends them. Either way the engine computes the tokens that did not come. Pages that a stalled read
may still write go to quarantine until that read has settled.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from penstock.common.logs import about
from penstock.common.messages import (
    Abort,
    Fetch,
    FetchDone,
    PagesReady,
    Prefill,
    PrefillDone,
    PrefillFailed,
    WorkerInfo,
)
from penstock.common.rate_estimator import RateEstimator
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
)
from penstock.kv_transfer.leases import Landings, LandingState
from penstock.kv_transfer.mover import PageMover
from penstock.kv_transfer.peer_links import LinkEvent, PeerFound, PeerLinks, PeerLost
from penstock.kv_transfer.peer_transports import PeerTransports
from penstock.kv_transfer.read_figures import ReaderCounters, ReadHistograms
from penstock.kv_transfer.reading import Read, Reading, Wanted, key_of, landed

logger = logging.getLogger(__name__)
QUARANTINE = "quarantine"
_Event = ReadDone | ReadFailed | ReadMismatch | ReadSettled | ReadStalled


class ReadPages(Protocol):
    """What a reader needs of the page ledger."""

    page_size: int

    def table(self, holder: str) -> list[int]: ...
    def allocate(self, holder: str, count: int) -> list[int]: ...
    def promise(self, holder: str, count: int) -> None: ...
    def release_some(self, holder: str, pages: Iterable[int]) -> None: ...
    def move(self, holder: str, new_holder: str, pages: Iterable[int]) -> None: ...
    def name(self, page: int, page_hash: bytes, parent: bytes = b"") -> None: ...


@dataclass
class Reader:
    """All reads of one worker. Used from its loop thread; copying is the mover's."""

    pages: ReadPages
    mover: PageMover
    links: PeerLinks
    landings: Landings
    transports: PeerTransports
    rates: RateEstimator = field(default_factory=RateEstimator)  # is told how long reads take
    counters: ReaderCounters = field(default_factory=ReaderCounters)
    histograms: ReadHistograms = field(default_factory=ReadHistograms)
    _open: dict[str, Reading] = field(default_factory=dict)  # by key
    _requests: Counter[str] = field(default_factory=Counter)  # how many of `_open` are of each request
    _reads: dict[str, str] = field(default_factory=dict)  # tag of a read that may still write -> its key
    _ended: list[Read] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: str) -> bool:
        return key in self._open

    def reads_for(self, request_id: str) -> bool:
        """Pages of any choice of the request are on their way."""
        return self._requests[request_id] > 0

    @property
    def settled(self) -> bool:
        """Nothing is wanted, and no read may still write."""
        return not self._open and not self._reads

    @property
    def quarantined_pages(self) -> int:
        return len(self.pages.table(QUARANTINE))

    def holders(self) -> set[str]:
        """For whom pages are held here: of the quarantine only if all of it will be given back."""
        whole = self.quarantined_pages == self.landings.quarantined_pages
        return {*self._open, QUARANTINE} if whole else set(self._open)

    def rows(self, now: float) -> list[dict[str, object]]:
        """What is being read, for /debug/ledger: for whom, from which incarnation, and how long nothing has come."""
        return [r.row(self.pages.table(r.wanted.key)[r.wanted.first_page :], now) for r in self._open.values()]

    # ------------------------------------------------------------ begin and end

    def hand_off(self, wanted: Wanted, worker: WorkerInfo, message: Prefill, now: float) -> None:
        """Ask a prefill worker to compute the prompt and to lend its pages."""
        self.counters.handoffs += 1
        self._begin(Reading(wanted, worker, False, now, now), message, now)

    def fetch(self, wanted: Wanted, worker: WorkerInfo, now: float) -> None:
        """Ask a worker to lend what it caches of these pages; the last may be full in part (`Wanted.num_tokens`)."""
        self.counters.fetches += 1
        first, end = wanted.first_page, wanted.first_page + wanted.num_pages
        message = Fetch(
            request_id=wanted.request_id,
            attempt=wanted.attempt,
            choice=wanted.choice,
            first_page=first,
            hashes=list(wanted.hashes[first:end]),
        )
        self._begin(Reading(wanted, worker, True, now, now), message, now)

    def cancel(self, key: str) -> bool:
        """The request has ended: end its reading on both sides. Its pages are the caller's to release, but for those
        that may still be written. False if nothing is read for it."""
        reading = self._open.get(key)
        if reading is None:
            return False
        self._give_up(reading)
        self._settle(reading)
        return True

    def take_ended(self) -> list[Read]:
        """What has ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def expire(self, now: float) -> None:
        """Trust what a lender has vouched for; give up those that do not get on."""
        size, rate = self.pages.page_size, self.rates.rates().prefill_tokens_per_s
        for reading in list(self._open.values()):
            if reading.unproven:
                self._prove(reading, now)
            elif reading.waits_too_long(now, reading.wanted.first_page * size, rate):
                self._fail(reading, f"no ticket for {now - reading.came_at:.1f} s", now)

    # ------------------------------------------------------------ from the lender

    def link_event(self, incarnation: str, event: LinkEvent, now: float) -> None:
        """Something came over the link to this worker."""
        if isinstance(event, PeerFound):
            self._find(event.worker, now)
        elif isinstance(event, PeerLost):
            self._lose(event, now)
        elif isinstance(event, PagesReady):
            self._ticket(incarnation, event, now)
        elif isinstance(event, (PrefillDone, FetchDone, PrefillFailed)):
            reading = self._open.get(key_of(event))
            if reading is None or reading.worker.incarnation != incarnation:
                return
            if isinstance(event, PrefillFailed):
                self._fail(reading, f"{event.code}: {event.message}", now)
            else:
                self._all_lent(reading, event, now)

    def _find(self, worker: WorkerInfo, now: float) -> None:
        """Handshake done: connect the pool of this worker."""
        for reading in self._from(worker.incarnation):
            reading.came_at = now
        transport = self.transports.find(worker)
        if transport:
            self.mover.connect(worker.incarnation, transport, worker.transports[transport])
        else:
            self._fail_all(worker.incarnation, self.transports.unreadable[worker.incarnation], now)

    def _lose(self, event: PeerLost, now: float) -> None:
        """The lender is gone: what has landed is kept, the rest is computed here."""
        self._fail_all(event.incarnation, event.reason, now)
        if self.transports.forget(event.incarnation):
            self.mover.disconnect(event.incarnation)

    def _ticket(self, incarnation: str, message: PagesReady, now: float) -> None:
        """Bind our pages to a ticket and read; duplicate, late and unknown tickets change nothing."""
        key = key_of(message)
        reading = self._open.get(key)
        pages = message.pages[0]
        if reading is None or reading.worker.incarnation != incarnation:
            self.links.send_if_linked(incarnation, landed(message))
            return
        transport = self.transports.chosen.get(incarnation)
        if reading.failed or transport is None or not self.landings.accepts(key, message.first_page, len(pages)):
            return
        bound = self.pages.allocate(key, len(pages))  # out of what was promised to it
        reading.transport = transport
        reading.ticketed_tokens = message.num_tokens
        reading.first_ticket_at = now if reading.first_ticket_at is None else reading.first_ticket_at
        reading.came_at = now
        tag = self.landings.start(key, message.first_page, bound)
        self._reads[tag] = key
        reading.reads += 1
        checksums = message.checksums[0] if message.checksums else []
        reading.checked = bool(checksums)
        self.mover.read(ReadJob(tag, incarnation, transport, tuple(pages), tuple(bound), tuple(checksums), key))

    def _all_lent(self, reading: Reading, message: PrefillDone | FetchDone, now: float) -> None:
        wanted = reading.wanted
        if isinstance(message, PrefillDone):
            reading.first = message
            reading.computed_at = now - message.held_ms / 1e3
        if reading.failed == "":
            if isinstance(message, PrefillDone) and message.finish is not None:
                self._give_up(reading)  # ended with its first token: the pages are not needed
            else:
                fetched = wanted.first_page + message.num_pages if isinstance(message, FetchDone) else None
                self.landings.complete(wanted.key, fetched)
                if self.landings.state(wanted.key) is LandingState.FAILED:
                    self._fail(reading, "its lender has left pages out", now)
                    return
        self._try_end(reading, now)

    # ------------------------------------------------------------ from the mover

    def completed(self, event: Completion, now: float) -> None:
        """A read of ours ended, stalled or settled."""
        if isinstance(event, ConnectFailed):
            self._fail_all(event.peer, f"{event.transport}: {event.reason}", now)
            worker = self.transports.refuse(event.peer, event.transport, event.reason)
            if worker is not None:  # later ones may come over another
                self._find(worker, now)
        elif not isinstance(event, Sealed):
            key = self._reads[event.tag]
            if not isinstance(event, ReadStalled):
                del self._reads[event.tag]
            if isinstance(event, ReadMismatch):  # also of what was given up meanwhile
                self.counters.checksum_failures += len(event.pages)
            reading = self._open.get(key)
            if reading is not None:
                self._read_event(reading, event, now)
            elif not isinstance(event, ReadStalled):  # of what was given up: its pages leave quarantine
                self.pages.release_some(QUARANTINE, self.landings.read_ended(event.tag))

    def _read_event(self, reading: Reading, event: _Event, now: float) -> None:
        reason = ""
        reading.reads -= not isinstance(event, ReadSettled)
        if isinstance(event, ReadDone):
            reading.landed_at = event.finished_at
            reading.came_at = now
            reading.size_bytes += event.size_bytes
            self.histograms.read(event.seconds, event.size_bytes, event.size_bytes // reading.worker.page_bytes)
            if not reading.fetch:
                self.rates.read(event.size_bytes, event.seconds)
            if not reading.checked:
                reading.unproven[event.tag] = self.links.ask(reading.worker.incarnation, now)
            elif event.finished_at < self.links.leased_until(reading.worker.incarnation):
                self.landings.read_done(event.tag)
            else:
                self.landings.read_ended(event.tag)
                reason = "pages landed after the lender's lease may have ended"
        elif isinstance(event, ReadStalled):
            self.landings.read_stalled(event.tag)
            reason = f"no progress for {event.seconds:.1f} s"
        else:
            self.landings.read_ended(event.tag)
            if isinstance(event, ReadMismatch):
                reading.mismatches += len(event.pages)
                reason = f"checksums of {len(event.pages)} pages differ"
            else:
                reason = event.reason if isinstance(event, ReadFailed) else "the read was given up"
        if reason:
            self._fail(reading, reason, now)
        else:
            self._try_end(reading, now)

    # ------------------------------------------------------------ inside

    def _prove(self, reading: Reading, now: float) -> None:
        """Trust the reads without checksums that their lender has answered for: while it dies its pool goes, and what
        mapped memory shows then nobody knows."""
        incarnation = reading.worker.incarnation
        proven = self.links.proven(incarnation)
        for tag in [tag for tag, number in reading.unproven.items() if number <= proven]:
            del reading.unproven[tag]
            self.landings.read_done(tag)
            reading.landed_at = reading.came_at = now
        if reading.unproven and now >= self.links.leased_until(incarnation):
            self._fail(reading, "the lender does not say that it still has what was read", now)
        else:
            self._try_end(reading, now)

    def _begin(self, reading: Reading, message: Prefill | Fetch, now: float) -> None:
        wanted, incarnation = reading.wanted, reading.worker.incarnation
        self._open[wanted.key] = reading
        self._requests[wanted.request_id] += 1
        self.counters.asked_tokens += wanted.num_tokens - wanted.first_page * self.pages.page_size
        self.landings.promise(wanted.key, wanted.first_page, wanted.num_pages)
        if incarnation in self.transports.unreadable:
            self._fail(reading, self.transports.unreadable[incarnation], now)
        else:
            self.links.send(reading.worker, message, now)

    def _fail_all(self, incarnation: str, reason: str, now: float) -> None:
        for reading in self._from(incarnation):
            self._fail(reading, reason, now)

    def _from(self, incarnation: str) -> list[Reading]:
        return [reading for reading in self._open.values() if reading.worker.incarnation == incarnation]

    def _fail(self, reading: Reading, reason: str, now: float) -> None:
        if not reading.failed:
            reading.failed = reason
            if reading.fetch:
                self.counters.fetch_failures += 1
            else:
                self.counters.handoff_failures += 1
            logger.warning(
                "%s failed, computing the rest here: %s",
                reading.kind,
                reason,
                extra=about(reading.wanted),
            )
            self._give_up(reading)
        self._try_end(reading, now)

    def _give_up(self, reading: Reading) -> None:
        """Tell a prefill worker to stop computing; reads under way are cut short."""
        wanted = reading.wanted
        if not reading.fetch:
            abort = Abort(request_id=wanted.request_id, attempt=wanted.attempt, choice=wanted.choice)
            self.links.send_if_linked(reading.worker.incarnation, abort)
        for tag, key in self._reads.items():
            if key == wanted.key:
                self.mover.cancel(tag)
        self.landings.fail(wanted.key)

    def _try_end(self, reading: Reading, now: float) -> None:
        """Over, if all has landed. What failed is over at once: reads that may still write keep their pages."""
        if self.landings.state(reading.wanted.key) in (LandingState.LANDED, LandingState.FAILED):
            computed = self._settle(reading)
            if reading.fetch and reading.size_bytes and not reading.failed:  # asking for it is part of what it costs
                self.rates.read(reading.size_bytes, now - reading.began_at)
            spans = reading.spans(now)
            self._ended.append(Read(reading.wanted.key, computed, reading.first, spans))

    def _settle(self, reading: Reading) -> int:
        """Close the books: keep the leading landed pages, free or quarantine the rest. Tokens kept, in all."""
        wanted, size = reading.wanted, self.pages.page_size
        for tag in reading.unproven:
            self.landings.read_ended(tag)
        outcome = self.landings.take(wanted.key)
        del self._open[wanted.key]
        self._requests[wanted.request_id] -= 1
        if not self._requests[wanted.request_id]:
            del self._requests[wanted.request_id]
        self.links.send_if_linked(reading.worker.incarnation, landed(wanted))
        if outcome.idle:  # their contents are unknown; the engine will need as many, so they stay promised
            self.pages.release_some(wanted.key, outcome.idle)
            self.pages.promise(wanted.key, len(outcome.idle))
        if outcome.quarantined:
            self.pages.move(wanted.key, QUARANTINE, outcome.quarantined)
        held_tokens = wanted.first_page * size
        known = min(held_tokens + len(outcome.landed) * size, reading.ticketed_tokens, wanted.num_tokens)
        tokens = max(held_tokens, known)
        reading.num_pages, reading.num_tokens = len(outcome.landed), tokens - held_tokens
        self.counters.transfer_pages += len(outcome.landed)
        self.counters.received_tokens += reading.num_tokens
        if reading.fetch:
            self.counters.fetched_tokens += reading.num_tokens
        table, hashes = self.pages.table(wanted.key), wanted.hashes
        # Without its first token the prompt's last one is computed again: nobody else may find the page it is in.
        final = tokens if reading.fetch or reading.first is not None else min(tokens, wanted.num_tokens - 1)
        for index in range(wanted.first_page, min(final // size, len(hashes))):
            self.pages.name(table[index], hashes[index], hashes[index - 1] if index else b"")
        return tokens
