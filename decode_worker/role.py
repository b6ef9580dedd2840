"""The decode worker's role: admit, get the prompt's pages or compute them here, decode, stream tokens to the routers.

In: `Submit`, `Abort` from routers; `Fetch`, `PagesLanded` from workers; tickets and their ends over its own links.
Out: `TokenBatch` to the routers; `Prefill`, `Fetch`, `Abort`, `PagesLanded` to workers it reads from; tickets.

    Submit -> Admission -> (hand-off | fetch | nothing to read) -> engine -> finished
Every entry is in exactly one of these places; `_entries` has all that left Admission.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from penstock.common.bus import MAX_MESSAGE_BYTES, split_identity
from penstock.common.messages import (
    Abort,
    AnyMessage,
    Fetch,
    Finish,
    Move,
    Prefill,
    Spans,
    Submit,
    WorkerInfo,
    request_key,
)
from penstock.decode_worker.admission import Admission, Entry
from penstock.decode_worker.moves import MovedPages, Tail
from penstock.engine.outputs import StepOutput
from penstock.engine.replies import log_end, prompt_scores_bytes, to_delta
from penstock.engine.request import Request
from penstock.engine.worker_loop import WorkerLoop
from penstock.kv_transfer.exchange import PageExchange
from penstock.kv_transfer.reading import Read, Wanted

logger = logging.getLogger(__name__)
MAX_PROMPT_SCORES_BYTES = MAX_MESSAGE_BYTES - (1 << 20)  # the rest of a message is small


class DecodeRole:
    """Implements `Role` for the decode worker; with no prefill worker named, it runs whole requests."""

    def __init__(self, loop: WorkerLoop, exchange: PageExchange) -> None:
        self._loop = loop
        self._engine = loop.engine
        self._pages = loop.engine.pages
        self._exchange = exchange
        self._reader = exchange.reader
        self._admission = Admission(loop.engine.pages, loop.engine.scheduler.max_num_seqs)
        self._entries: dict[str, Entry] = {}
        self._transfers: dict[str, Spans] = {}  # what was read for requests that are in the engine now
        self._moved = MovedPages(loop.engine.pages, loop.peers.lease_s)
        self._leaving: dict[str, tuple[Entry, Finish, int]] = {}  # moved, but a step may still write their last page
        self._to_move: set[str] = set()  # keys, as soon as they run
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._cached_tokens = 0

    # ------------------------------------------------------------ messages

    def handle(self, identity: bytes, message: AnyMessage, now: float) -> None:
        if isinstance(message, Submit):
            self._submit(identity, message, now)
        elif isinstance(message, Abort):
            self._abort(request_key(message.request_id, message.choice, message.attempt))
        elif isinstance(message, Move):
            self._to_move.add(request_key(message.request_id, message.choice, message.attempt))
        elif self._exchange.handle(identity, message, now):
            if isinstance(message, Fetch):  # its pages are lent now
                self._moved.release(message.request_id, message.choice)
        else:
            logger.warning("a decode worker has no use for %s", type(message).__name__)

    def peer_gone(self, identity: bytes) -> None:
        self._exchange.lender.peer_gone(identity)
        for entry in self._all_entries():
            if entry.identity == identity:
                self._abort(entry.key)

    def _submit(self, identity: bytes, message: Submit, now: float) -> None:
        request = message.request
        scheduler = self._engine.scheduler
        shape = Request(request, now)  # for its key and hashes
        size = self._pages.page_size
        if shape.key in self._entries or shape.key in self._admission:
            return
        if shape.num_known >= scheduler.max_model_len:
            message_text = (
                f"maximum context length is {scheduler.max_model_len} tokens, the prompt has {shape.num_known}"
            )
            self._refuse(identity, message, "context_length_exceeded", message_text, retryable=False)
        elif not request.prompt_token_ids:
            self._refuse(identity, message, "invalid_request", "the prompt is empty", retryable=False)
        elif request.wants_prompt_logprobs and (
            prompt_scores_bytes(request, self._loop.info.vocab_size) > MAX_PROMPT_SCORES_BYTES
        ):
            text = f"prompt_logprobs of {shape.num_known} tokens are more than a message holds: ask for fewer"
            self._refuse(identity, message, "invalid_request", text, retryable=False)
        elif self._loop.peers.draining:
            self._refuse(identity, message, "unavailable", "the worker is draining", retryable=True)
        else:
            # To score a prompt all of it is computed: nothing that is cached is of use.
            known = 0 if request.wants_prompt_logprobs else shape.num_known
            hashes = shape.extend_hashes(scheduler.hash_scope, size, known)
            moved = message.source is not None and message.prefill is None and request.output_token_ids and known
            tail = shape.tail_hash(scheduler.hash_scope, size, known - 1) if moved else b""
            entry = Entry(identity, request, message.prefill, now, list(hashes), source=message.source, tail=tail)
            self._admission.submit(entry)

    def _refuse(self, identity: bytes, message: Submit, code: str, text: str, *, retryable: bool) -> None:
        finish = Finish(reason="error", code=code, message=text, retryable=retryable)
        self._loop.replies.end(identity, message.request, finish)

    def _abort(self, key: str) -> None:
        """Free everything of a request, wherever it is. Not answered."""
        if self._admission.cancel(key) is not None:
            return
        leaving = self._leaving.pop(key, None)
        if leaving is not None:
            self._moved.release(leaving[0].request.request_id, leaving[0].request.choice)
        if self._entries.pop(key, None) is not None:
            if self._reader.cancel(key):
                self._pages.release(key)
            else:
                self._engine.scheduler.abort(key)
                self._transfers.pop(key, None)

    # ------------------------------------------------------------ turns

    def tick(self, now: float) -> None:
        self._exchange.poll(now)
        self._admit(now)
        for entry in self._admission.expired(now):
            finish = Finish(
                reason="error",
                code="queue_timeout",
                message=f"no room within {entry.request.queue_timeout_s:.0f} s",
                retryable=bool(entry.request.output_token_ids),  # a stream that has begun may find room elsewhere
            )
            self._loop.replies.end(entry.identity, entry.request, finish)
        for read in self._reader.take_ended():
            self._start(read)
        self._moved.expire(now)
        if self._to_move:
            self._move(now)
        if self._leaving:
            self._leave()

    def _move(self, now: float) -> None:
        """End what is to go on elsewhere: at once if it waits for room; if it reads pages, when it has them."""
        for key in list(self._to_move):
            waiting = self._admission.cancel(key)
            entry = self._entries.get(key)
            request = self._engine.scheduler.get(key)
            if waiting is not None:
                self._loop.replies.end(waiting.identity, waiting.request, Finish(reason="moved"))
            elif entry is not None and request is not None:
                pages, tail = self._of_use(request)
                kept = self._moved.keep(entry.request.request_id, entry.request.choice, pages, now, tail)
                kept_tokens = min(kept * self._pages.page_size, request.num_known - 1)
                finish = Finish(reason="moved", kept_tokens=kept_tokens)
                leaving = entry, finish, request.num_output
                self._abort(key)
                self._leaving[key] = leaving
            elif entry is not None:
                continue
            self._to_move.discard(key)

    def _leave(self) -> None:
        """Tell the ends of what has moved, as soon as what it computed can be asked for."""
        for key, (entry, finish, index) in list(self._leaving.items()):
            if self._moved.is_whole(entry.request.request_id, entry.request.choice):
                del self._leaving[key]
                self._loop.replies.end(entry.identity, entry.request, finish, index=index)

    def _of_use(self, request: Request) -> tuple[list[int], Tail | None]:
        """Pages with which a request can go on elsewhere: full ones, and what stands behind them. To score a prompt all
        of it is computed."""
        if request.scores_prompt:
            return [], None
        scope, size, computed = self._engine.scheduler.hash_scope, self._pages.page_size, request.num_known - 1
        hashes = request.extend_hashes(scope, size, computed)[: computed // size]
        pages = self._pages.match(hashes)
        tail = request.tail_hash(scope, size, computed)
        if not tail or len(pages) < len(hashes) or request.computed < computed or not self._pages.caching:
            return pages, None
        page = self._pages.table(request.key)[computed // size]
        return pages, Tail(page, tail, hashes[-1] if hashes else b"")

    def _admit(self, now: float) -> None:
        preempted, waits = self._preempted() > 0, self._awaits_sibling
        admitted = self._admission.admit(now, len(self._entries), preempted=preempted, waits=waits)
        for entry in admitted:
            self._entries[entry.key] = entry
            lender = self._lender_of(entry)
            if lender is not None or entry.held_tokens:  # else the scheduler looks, and counts, itself
                self._prefix_queries += entry.num_tokens
                self._prefix_hits += entry.held_tokens
            if lender is None or lender is not entry.prefill:  # else a prefill worker computes it, and counts all of it
                self._cached_tokens += entry.held_tokens
            if lender is None:
                self._engine.add(entry.request, arrived=entry.arrived, computed=entry.held_tokens)
            elif lender is entry.prefill:
                router_id, _ = split_identity(entry.identity)
                prefill = Prefill(
                    request=entry.request,
                    router_id=router_id,
                    held_tokens=entry.held_tokens,
                    source=entry.source,
                    link_bytes_per_s=self._reader.rates.rates().link_bytes_per_s,
                )
                self._reader.hand_off(self._wanted(entry, entry.num_tokens), lender, prefill, now)
            else:
                full = (entry.num_tokens - 1) // self._pages.page_size * self._pages.page_size
                self._reader.fetch(self._wanted(entry, entry.num_tokens - 1 if entry.tail else full), lender, now)

    def _preempted(self) -> int:
        """Sequences that want room again; one that waits to be told what it may say next does not want it yet."""
        return sum(bool(request.preemptions and request.may_go_on) for request in self._engine.scheduler.waiting)

    def _awaits_sibling(self, entry: Entry) -> bool:
        """Another choice of the request reads or computes pages of their prompt, which this one will find in the cache:
        that is done once, and they are there once."""
        request, size = entry.request, self._pages.page_size
        shares = self._pages.caching and len(request.prompt_token_ids) > size and not request.wants_prompt_logprobs
        if not shares or request.output_token_ids:
            return False
        if self._engine.scheduler.computes_for(request.request_id):
            return True
        # A prompt whose first token is also the last brings no pages: the prefill worker shares it among its choices.
        brings_none = entry.prefill is not None and request.sampling.max_tokens == 1
        return not brings_none and self._reader.reads_for(request.request_id)

    def _lender_of(self, entry: Entry) -> WorkerInfo | None:
        """Who computes the prompt for us or lends what it caches of it; None: all that is missing is computed here."""
        least = 1 if entry.tail else self._pages.page_size
        if entry.num_tokens - entry.held_tokens <= least:
            return None
        if entry.prefill is not None or entry.request.wants_prompt_logprobs:
            return entry.prefill
        return entry.source

    def _wanted(self, entry: Entry, num_tokens: int) -> Wanted:
        """The pages that the first `num_tokens` tokens lack."""
        request, held = entry.request, entry.held_tokens // self._pages.page_size
        hashes = entry.hashes
        if entry.tail:
            hashes = [*hashes[: num_tokens // self._pages.page_size], entry.tail]
        return Wanted(
            key=entry.key,
            request_id=request.request_id,
            attempt=request.attempt,
            choice=request.choice,
            first_page=held,
            num_pages=self._pages.pages_for(num_tokens) - held,
            num_tokens=num_tokens,
            hashes=hashes,
        )

    def _start(self, read: Read) -> None:
        """A hand-off or fetch has ended: decode, or compute what is missing first."""
        entry = self._entries[read.key]
        first = read.first
        if first is not None and first.undelivered is not None:
            self._loop.replies.add(entry.identity, first.undelivered)
        if first is not None and first.finish is not None:
            del self._entries[entry.key]
            self._pages.release(entry.key)
            return
        request = entry.request
        if first is not None:
            request = msgspec.structs.replace(request, output_token_ids=[*request.output_token_ids, *first.token_ids])
        known = len(request.prompt_token_ids) + len(request.output_token_ids)
        if known >= self._engine.scheduler.max_model_len:  # its first token has filled the context
            del self._entries[entry.key]
            self._pages.release(entry.key)
            self._loop.replies.end(entry.identity, request, Finish(reason="length"))
            return
        # Without its first token the request still needs the logits of its last one.
        computed = read.computed if first is not None else min(read.computed, entry.num_tokens - 1)
        if first is None and request.wants_prompt_logprobs:  # the scores of what has landed are lost
            self._pages.release(entry.key)
            computed = 0
        self._transfers[entry.key] = read.spans
        self._engine.add(request, arrived=entry.arrived, computed=computed)

    def stepped(self, output: StepOutput, now: float) -> None:
        for item in output.outputs:
            entry = self._entries[item.key]
            spans = item.spans and self._complete(item.spans, entry)
            if item.finish is not None:
                log_end(item, spans)
                del self._entries[item.key]
                self._transfers.pop(item.key, None)
            self._loop.replies.add(entry.identity, to_delta(item, spans))

    def _complete(self, spans: Spans, entry: Entry) -> Spans:
        """The engine's figures of a request, with those of its admission and its hand-off."""
        transfer = self._transfers.get(entry.key)
        # What was read counts as computed before in the engine; without that it knows better what it found, and when.
        cached_tokens = spans.cached_tokens if transfer is None else entry.held_tokens
        return msgspec.structs.replace(
            transfer or Spans(),
            worker=self._loop.info.worker_id,
            queue_ms=(entry.admitted - entry.arrived) * 1e3,
            prefill_ms=spans.prefill_ms,
            decode_ms=spans.decode_ms,
            cached_tokens=cached_tokens,
            computed_tokens=spans.computed_tokens,
            preemptions=spans.preemptions,
        )

    def _all_entries(self) -> list[Entry]:
        return [*self._admission.entries(), *self._entries.values()]

    def give_up(self, finish: Finish) -> None:
        for entry, moved, num_output in self._leaving.values():
            self._loop.replies.end(entry.identity, entry.request, moved, index=num_output)
        self._leaving.clear()
        for entry in self._all_entries():
            request = self._engine.scheduler.get(entry.key)
            index = request.num_output if request is not None else None
            self._abort(entry.key)
            self._loop.replies.end(entry.identity, entry.request, finish, index=index)

    # ------------------------------------------------------------ figures

    def busy(self) -> bool:
        return bool(self._entries) or len(self._admission) > 0 or len(self._moved) > 0 or self._exchange.busy()

    def holders(self) -> set[str]:
        return self._exchange.holders() | self._moved.holders()

    def load(self) -> dict[str, int]:
        return {
            **self._exchange.load(),
            "waiting": len(self._admission) + len(self._reader),
            "deferred": len(self._reader),
            "held_up": len(self._admission) + self._preempted(),
            "queued_tokens": self._admission.queued_tokens,
            "moved": self._moved.total,
            "prefix_queries": self._prefix_queries,
            "prefix_hits": self._prefix_hits,
            "cached_tokens": self._cached_tokens,
        }

    def histograms(self) -> dict[str, list[float]]:
        return self._reader.histograms.packed()

    def transports(self) -> dict[str, str]:
        return self._reader.transports.by_worker()

    def ledger(self) -> dict[str, Any]:
        return {"requests": len(self._entries), "admission": len(self._admission), **self._exchange.ledger()}

    def close(self) -> bool:
        return self._exchange.close()
