"""The prefill worker's role: compute prompts for decode workers, lend the pages, give up the first token.

In: `Prefill`, `Abort`, `PagesLanded` from decode workers. Out: a ticket (`PagesReady`) whenever a chunk's pages are
complete and sealed, the first token straight to the request's router, `PrefillDone` after the last ticket.

    Prefill ──> (fetch from a worker that holds the prefix ──>) engine ──> tickets, first token ──> done

A page is held by the request's key until the engine is done with it, and by its loan from the moment it is to be lent
until the decode worker has read it (`PagesLanded`), is gone, or its lease has ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from penstock.common.messages import (
    Abort,
    AnyMessage,
    Finish,
    GenerateRequest,
    Prefill,
    PrefillDone,
    PrefillFailed,
    Spans,
    WorkerInfo,
    request_key,
)
from penstock.engine.outputs import HANDED_OFF, Output, StepOutput
from penstock.engine.replies import log_end, to_delta
from penstock.engine.request import Request
from penstock.engine.worker_loop import WorkerLoop
from penstock.kv_transfer.exchange import PageExchange
from penstock.kv_transfer.lender import Loan
from penstock.kv_transfer.reading import Read, Wanted

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _HandOff:
    """One prompt being computed for a decode worker."""

    request: GenerateRequest
    router_id: str
    loan: Loan
    link_bytes_per_s: float
    fetched: Spans | None = None  # the figures of its fetch, if it began with one

    @property
    def key(self) -> str:
        return self.loan.key


class HandOffOut:
    """Implements `Role` for the prefill worker."""

    def __init__(self, loop: WorkerLoop, exchange: PageExchange, clock: Callable[[], float] = time.monotonic):
        self._loop = loop
        self._engine = loop.engine
        self._pages = loop.engine.pages
        self._exchange = exchange
        self._lender = exchange.lender
        self._reader = exchange.reader
        self._clock = clock
        self._open: dict[str, _HandOff] = {}
        self._behind: dict[str, _HandOff] = {}  # of those: choices for which another one of their request fetches
        self._prefix_queries = 0
        self._prefix_hits = 0

    # ------------------------------------------------------------ messages

    def handle(self, identity: bytes, message: AnyMessage, now: float) -> None:
        if isinstance(message, Prefill):
            self._begin(identity, message, now)
        elif isinstance(message, Abort):
            key = request_key(message.request_id, message.choice, message.attempt)
            self._end(identity, key)
            self._lender.landed(identity, key)
        elif self._exchange.handle(identity, message, now):
            self._drop_ended()
        else:
            logger.warning("a prefill worker has no use for %s", type(message).__name__)

    def peer_gone(self, identity: bytes) -> None:
        self._lender.peer_gone(identity)
        self._drop_ended()

    def _begin(self, identity: bytes, message: Prefill, now: float) -> None:
        request = message.request
        key = request_key(request.request_id, request.choice, request.attempt)
        if key in self._open:
            return
        if self._loop.peers.draining:
            self._fail(identity, request, "unavailable", "the prefill worker is draining")
            return
        first_page = message.held_tokens // self._pages.page_size
        loan = self._lender.open(identity, key, request.request_id, request.attempt, request.choice, first_page, now)
        handoff = self._open[key] = _HandOff(request, message.router_id, loan, message.link_bytes_per_s)
        alike = not request.output_token_ids  # then its other choices bring the same pages
        if message.source is not None and alike and self._reader.reads_for(request.request_id):
            self._behind[key] = handoff
        elif message.source is None or not self._fetch(handoff, message.source, now):
            self._compute(handoff, 0, now)

    def _fetch(self, handoff: _HandOff, source: WorkerInfo, now: float) -> bool:
        """Ask a worker that holds more of the prompt for its pages; False if there is no room, or nothing to gain."""
        pages, size = self._pages, self._pages.page_size
        shape = Request(handoff.request, now)  # for its hashes
        if shape.scores_prompt or shape.num_known >= self._engine.scheduler.max_model_len:
            return False
        hashes = shape.extend_hashes(self._engine.scheduler.hash_scope, size, shape.num_known - 1)
        held = pages.match(hashes)
        missing = pages.pages_for(shape.num_known) - len(held)
        if len(held) == len(hashes) or not pages.has_room(handoff.key, held, missing):
            return False
        pages.hold(handoff.key, held)
        pages.promise(handoff.key, missing)
        self._prefix_queries += shape.num_known
        self._prefix_hits += len(held) * size
        request = handoff.request
        wanted = Wanted(
            key=handoff.key,
            request_id=request.request_id,
            attempt=request.attempt,
            choice=request.choice,
            first_page=len(held),
            num_pages=len(hashes) - len(held),
            num_tokens=len(hashes) * size,
            hashes=hashes,
        )
        self._reader.fetch(wanted, source, now)
        return True

    def _compute(self, handoff: _HandOff, computed: int, now: float) -> None:
        """Queue the prompt, of which the first `computed` tokens are in its pages already: from now on it waits for
        room."""
        try:
            moved = self._moved_per_token(handoff)
            self._engine.add(handoff.request, arrived=now, computed=computed, moved_per_token=moved)
        except ValueError as error:
            self._drop(handoff)
            self._fail(handoff.loan.identity, handoff.request, "invalid_request", str(error))

    def _moved_per_token(self, handoff: _HandOff) -> float:
        """Of how many tokens the decode worker reads the pages while one is computed; 0 until both rates are known."""
        rate = self._engine.rates.rates().prefill_tokens_per_s
        token_bytes = self._loop.info.page_bytes / self._pages.page_size
        return handoff.link_bytes_per_s / (token_bytes * rate) if rate > 0 else 0.0

    def _end(self, identity: bytes, key: str) -> None:
        """The decode worker does not want this hand-off any more."""
        handoff = self._open.get(key)
        if handoff is not None and handoff.loan.identity == identity:
            self._drop(handoff)

    # ------------------------------------------------------------ turns

    def tick(self, now: float) -> None:
        for request in self._engine.scheduler.expired(now):
            handoff = self._open.get(request.key)
            if handoff is not None:
                self._drop(handoff)
                identity, source = handoff.loan.identity, handoff.request
                self._fail(identity, source, "queue_timeout", "the prefill worker had no room in time")
        self._exchange.poll(now)
        for read in self._reader.take_ended():
            self._fetched(read, now)
        for key, handoff in list(self._behind.items()):
            if not self._reader.reads_for(handoff.request.request_id):  # what has come is in the cache now
                del self._behind[key]
                self._compute(handoff, 0, now)

    def _fetched(self, read: Read, now: float) -> None:
        """A fetch has ended: lend on what has come, and compute the rest."""
        handoff = self._open.get(read.key)
        if handoff is None:  # aborted in the turn in which its fetch failed
            return
        handoff.fetched = read.spans
        self._offer(handoff, read.computed, now)
        self._compute(handoff, read.computed, now)

    def stepped(self, output: StepOutput, now: float) -> None:
        finished = {o.key: o for o in output.outputs}
        for progress in output.progress:
            handoff = self._open.get(progress.key)
            if handoff is None:
                continue
            last = finished.get(progress.key)
            if last is None or last.finish is HANDED_OFF:
                self._offer(handoff, progress.computed, self._clock(), whole=last is not None)
            if last is not None:
                self._finish(handoff, last)
        for key, last in finished.items():  # ended without being computed: its form allows nothing more
            handoff = self._open.get(key)
            if handoff is not None:
                self._finish(handoff, last)

    def _offer(self, handoff: _HandOff, computed: int, now: float, *, whole: bool = False) -> None:
        """Lend the pages that are complete now (with the prompt's end: the partial last one, too)."""
        size = self._pages.page_size
        end = self._pages.pages_for(computed) if whole else computed // size
        if end > handoff.loan.next_page:
            pages = self._pages.table(handoff.key)[handoff.loan.next_page : end]
            self._lender.offer(handoff.loan, pages, computed, now)

    def _finish(self, handoff: _HandOff, output: Output) -> None:
        """The first token: to the router at once, to the decode worker behind the last ticket."""
        spans = output.spans or Spans()
        if handoff.fetched is not None:
            fetched = handoff.fetched
            spans = msgspec.structs.replace(
                spans,
                cached_tokens=max(0, spans.cached_tokens - fetched.fetched_tokens),
                fetch_ms=fetched.fetch_ms,
                fetch_bytes=fetched.fetch_bytes,
                fetched_tokens=fetched.fetched_tokens,
                source=fetched.source,
                transport=fetched.transport,
                checksum_failures=fetched.checksum_failures,
            )
        spans = msgspec.structs.replace(spans, worker=self._loop.info.worker_id)
        log_end(output, spans)
        delta = to_delta(output, spans)
        router = self._loop.peers.identity_of(handoff.router_id)
        if router is not None:
            self._loop.replies.add(router, delta)
        done = PrefillDone(
            request_id=handoff.request.request_id,
            attempt=handoff.request.attempt,
            choice=handoff.request.choice,
            token_ids=list(output.token_ids),
            finish=delta.finish,
            spans=spans,
            # A last token that is lost on the way would be missed by nobody: the decode worker says it again.
            undelivered=delta if router is None or delta.finish is not None else None,
        )
        del self._open[handoff.key]
        self._pages.release(handoff.key)  # what is offered is held by the loan
        computed_at = self._clock()

        def behind_the_last_ticket(now: float) -> PrefillDone:
            return msgspec.structs.replace(done, held_ms=max(0.0, now - computed_at) * 1e3)

        self._lender.close(handoff.loan, behind_the_last_ticket, computed_at)

    # ------------------------------------------------------------ ends

    def _drop(self, handoff: _HandOff) -> None:
        """Stop computing, or fetching, and forget what was not lent yet.

        Pages that a submitted step still writes are the scheduler's until it is done: the key has none of them then.
        """
        del self._open[handoff.key]
        source = handoff.request
        if self._behind.pop(handoff.key, None) is None and not self._reader.cancel(handoff.key):
            self._engine.abort(source.request_id, source.choice, source.attempt)
        self._pages.release(handoff.key)
        self._lender.drop(handoff.loan)

    def _drop_ended(self) -> None:
        """Whose loan has ended, because the reader is gone or has had enough."""
        for handoff in [h for h in self._open.values() if h.loan.ended]:
            self._drop(handoff)

    def _fail(self, identity: bytes, source: GenerateRequest, code: str, message: str) -> None:
        self._loop.bus.send(
            identity,
            PrefillFailed(
                request_id=source.request_id, attempt=source.attempt, choice=source.choice, code=code, message=message
            ),
        )

    def give_up(self, finish: Finish) -> None:
        for handoff in list(self._open.values()):
            self._fail(handoff.loan.identity, handoff.request, finish.code or "internal_error", finish.message)
        self._open.clear()
        self._behind.clear()

    # ------------------------------------------------------------ figures

    def busy(self) -> bool:
        return bool(self._open) or self._exchange.busy()

    def holders(self) -> set[str]:
        return self._exchange.holders()

    def load(self) -> dict[str, int]:
        return {
            **self._exchange.load(),
            "waiting": len(self._reader) + len(self._behind),
            "deferred": len(self._reader) + len(self._behind),
            "prefix_queries": self._prefix_queries,
            "prefix_hits": self._prefix_hits,
            "cached_tokens": self._prefix_hits,
        }

    def histograms(self) -> dict[str, list[float]]:
        return self._reader.histograms.packed()

    def transports(self) -> dict[str, str]:
        return self._reader.transports.by_worker()

    def ledger(self) -> dict[str, Any]:
        return {"handoffs": len(self._open), **self._exchange.ledger()}

    def close(self) -> bool:
        return self._exchange.close()
