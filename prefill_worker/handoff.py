"""The prefill worker's role: compute prompts for decode workers, lend the pages, give up the first token.

In: `Prefill`, `Abort`, `PagesLanded` from decode workers. Out: a ticket (`PagesReady`) whenever a chunk's pages are
complete and sealed, the first token straight to the request's router, `PrefillDone` after the last ticket.

A page is held by the request's key until the engine is done with it, and by LOANS from the moment it is to be lent
until the decode worker has read it (`PagesLanded`), is gone, or its lease has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from penstock.common.messages import (
    Abort,
    AnyMessage,
    Finish,
    GenerateRequest,
    PagesLanded,
    PagesReady,
    Prefill,
    PrefillDone,
    PrefillFailed,
    Spans,
)
from penstock.engine.outputs import HANDED_OFF, Output, StepOutput
from penstock.engine.replies import to_delta
from penstock.engine.request import request_key
from penstock.engine.worker_loop import WorkerLoop
from penstock.kv_transfer.leases import LoanBook
from penstock.kv_transfer.mover import PageMover, Sealed, SealJob

logger = logging.getLogger(__name__)
LOANS = "loans"
SAMPLE_EVERY = 16


@dataclass(eq=False)
class _HandOff:
    """One prompt being computed for a decode worker."""

    identity: bytes
    request: GenerateRequest
    router_id: str
    key: str
    next_page: int  # first page of the table that was not sealed yet
    checked: bool
    tickets: list[tuple[int, int, list[int]]] = field(default_factory=list)  # sealing: first page, tokens, page ids
    sealed: int = 0  # tickets numbered so far
    done: PrefillDone | None = None  # waits for the last ticket


class HandOffOut:
    """Implements `Role` for the prefill worker."""

    def __init__(
        self, loop: WorkerLoop, mover: PageMover, book: LoanBook, kv_checksum: str, clock: Callable[[], float]
    ):
        self._loop = loop
        self._engine = loop.engine
        self._pages = loop.engine.pages
        self._mover = mover
        self._book = book
        self._checksum = kv_checksum
        self._clock = clock
        self._open: dict[str, _HandOff] = {}
        self._count = 0
        self._lent_total = 0

    # ------------------------------------------------------------ messages

    def handle(self, identity: bytes, message: AnyMessage, now: float) -> None:
        if isinstance(message, Prefill):
            self._begin(identity, message, now)
        elif isinstance(message, (PagesLanded, Abort)):
            self._end(identity, request_key(message.request_id, message.choice, message.attempt))
        else:
            logger.warning("a prefill worker has no use for %s", type(message).__name__)

    def peer_renewed(self, identity: bytes, now: float) -> None:
        self._book.renew(_name(identity), now)

    def peer_gone(self, identity: bytes) -> None:
        # A peer that merely connected anew may still read: it will not trust what it reads, having lost the hand-off.
        for handoff in [h for h in self._open.values() if h.identity == identity]:
            self._drop(handoff)
        self._unlend(self._book.drop_peer(_name(identity)))

    def _begin(self, identity: bytes, message: Prefill, now: float) -> None:
        request = message.request
        key = request_key(request.request_id, request.choice, request.attempt)
        if key in self._open:
            return
        self._count += 1
        handoff = _HandOff(
            identity,
            request,
            message.router_id,
            key,
            next_page=message.held_tokens // self._pages.page_size,
            checked=self._checksum == "all" or (self._checksum == "sample" and self._count % SAMPLE_EVERY == 1),
        )
        if self._loop.peers.draining:
            self._fail(handoff, "unavailable", "the prefill worker is draining")
            return
        try:
            self._engine.add(request, arrived=now)
        except ValueError as error:
            self._fail(handoff, "invalid_request", str(error))
            return
        self._open[key] = handoff

    def _end(self, identity: bytes, key: str) -> None:
        """The decode worker has all it wants of this hand-off, finished or not."""
        handoff = self._open.get(key)
        if handoff is not None and handoff.identity == identity:
            self._drop(handoff)
        self._unlend(self._book.land(_name(identity), key))

    # ------------------------------------------------------------ turns

    def tick(self, now: float) -> None:
        for request in self._engine.scheduler.expired(now):
            handoff = self._open.get(request.key)
            if handoff is not None:
                self._drop(handoff)
                self._fail(handoff, "queue_timeout", "the prefill worker had no room in time")
        for completion in self._mover.poll_done():
            if isinstance(completion, Sealed):
                key, _, _ = completion.tag.rpartition("#")
                if key in self._open:
                    self._lend(self._open[key], completion.checksums)
        self._unlend(self._book.expire(now))

    def stepped(self, output: StepOutput, now: float) -> None:
        finished = {o.key: o for o in output.outputs}
        for progress in output.progress:
            handoff = self._open.get(progress.key)
            if handoff is None:
                continue
            last = finished.get(progress.key)
            if last is None or last.finish is HANDED_OFF:
                self._seal(handoff, progress.computed, whole=last is not None)
            if last is not None and progress.key in self._open:  # else its reader has just been found silent
                self._finish(handoff, last)

    def _seal(self, handoff: _HandOff, computed: int, *, whole: bool) -> None:
        """Offer the pages that are complete now (with the prompt's end: the partial last one, too)."""
        size = self._pages.page_size
        end = self._pages.pages_for(computed) if whole else computed // size
        if end <= handoff.next_page:
            return
        pages = self._pages.table(handoff.key)[handoff.next_page : end]
        self._pages.hold(LOANS, pages)
        handoff.tickets.append((handoff.next_page, computed, list(pages)))
        handoff.next_page = end
        if handoff.checked:
            handoff.sealed += 1
            self._mover.seal(SealJob(f"{handoff.key}#{handoff.sealed}", tuple(pages)))
        else:
            self._mover.expect_readers()
            self._lend(handoff, [])

    def _lend(self, handoff: _HandOff, checksums: list[int]) -> None:
        """Send the oldest ticket of a hand-off; seals come back in order."""
        first_page, num_tokens, pages = handoff.tickets.pop(0)
        peer = _name(handoff.identity)
        refused = self._book.lend(peer, handoff.key, pages, self._clock())
        if refused:  # its loans have ended: the peer was silent for a lease
            self._unlend(refused)
            self._drop(handoff)
            return
        self._lent_total += len(pages)
        self._loop.bus.send(
            handoff.identity,
            PagesReady(
                request_id=handoff.request.request_id,
                attempt=handoff.request.attempt,
                choice=handoff.request.choice,
                first_page=first_page,
                pages=[pages],
                checksums=[checksums] if checksums else [],
                num_tokens=num_tokens,
                heartbeat_seq=self._loop.peers.heartbeat_seq(handoff.identity),
            ),
        )
        self._close_if_done(handoff)

    def _finish(self, handoff: _HandOff, output: Output) -> None:
        """The first token: to the router at once, to the decode worker behind the last ticket."""
        spans = msgspec.structs.replace(output.spans or Spans(), worker=self._loop.info.worker_id)
        delta = to_delta(output, spans)
        router = self._loop.peers.identity_of(handoff.router_id)
        if router is not None:
            self._loop.replies.add(router, delta)
        handoff.done = PrefillDone(
            request_id=handoff.request.request_id,
            attempt=handoff.request.attempt,
            choice=handoff.request.choice,
            token_ids=list(output.token_ids),
            finish=delta.finish,
            spans=spans,
            # A last token that is lost on the way would be missed by nobody: the decode worker says it again.
            undelivered=delta if router is None or delta.finish is not None else None,
        )
        self._close_if_done(handoff)

    def _close_if_done(self, handoff: _HandOff) -> None:
        if handoff.done is not None and not handoff.tickets:
            self._loop.bus.send(handoff.identity, handoff.done)
            del self._open[handoff.key]
            self._pages.release(handoff.key)

    # ------------------------------------------------------------ ends

    def _drop(self, handoff: _HandOff) -> None:
        """Stop computing and forget what was not lent yet.

        Pages that a submitted step still writes are the scheduler's until it is done: the key has none of them then.
        """
        del self._open[handoff.key]
        source = handoff.request
        self._engine.abort(source.request_id, source.choice, source.attempt)
        self._pages.release(handoff.key)
        for _, _, pages in handoff.tickets:
            self._unlend(pages)

    def _fail(self, handoff: _HandOff, code: str, message: str) -> None:
        source = handoff.request
        self._loop.bus.send(
            handoff.identity,
            PrefillFailed(
                request_id=source.request_id, attempt=source.attempt, choice=source.choice, code=code, message=message
            ),
        )

    def _unlend(self, pages: list[int]) -> None:
        if pages:
            self._pages.release_some(LOANS, pages)

    def give_up(self, finish: Finish) -> None:
        for handoff in list(self._open.values()):
            self._fail(handoff, finish.code or "internal_error", finish.message)
        self._open.clear()

    # ------------------------------------------------------------ figures

    def busy(self) -> bool:
        return bool(self._open) or self._book.lent_pages > 0

    def load(self) -> dict[str, int]:
        return {
            "handoffs": self._count,
            "lent_pages": self._book.lent_pages,
            "transfer_pages": self._lent_total,
            "expired_loans": self._book.expired,
        }

    def histograms(self) -> dict[str, list[float]]:
        return {}

    def ledger(self) -> dict[str, Any]:
        return {"handoffs": len(self._open), "lent_pages": self._book.lent_pages}

    def close(self) -> bool:
        return self._mover.close()


def _name(identity: bytes) -> str:
    return identity.decode()
