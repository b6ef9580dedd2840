"""The decode worker's role: admit, take hand-offs in (or compute prompts here), decode, stream tokens to the routers.

In: `Submit`, `Abort` from routers; tickets, `PrefillDone`, `PrefillFailed` over its own links to prefill workers.
Out: `TokenBatch` to the routers; `Prefill`, `Abort`, `PagesLanded` to prefill workers.

    Submit -> Admission -> (hand-off -> ready | local) -> engine -> finished
Every entry is in exactly one of these places; `_entries` has all that left Admission.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from penstock.common.bus import split_identity
from penstock.common.messages import (
    Abort,
    AnyMessage,
    Finish,
    PagesReady,
    PrefillDone,
    PrefillFailed,
    Spans,
    Submit,
)
from penstock.decode_worker.admission import Admission, Entry
from penstock.decode_worker.handoff import HandOffIn, Ready
from penstock.decode_worker.prefill_links import PrefillFound, PrefillLost
from penstock.engine.outputs import StepOutput
from penstock.engine.replies import to_delta
from penstock.engine.request import Request, request_key
from penstock.engine.worker_loop import WorkerLoop

logger = logging.getLogger(__name__)


class DecodeRole:
    """Implements `Role` for the decode worker; with no prefill worker named, it runs whole requests."""

    def __init__(self, loop: WorkerLoop, handoffs: HandOffIn) -> None:
        self._loop = loop
        self._engine = loop.engine
        self._pages = loop.engine.pages
        self._handoffs = handoffs
        self._admission = Admission(loop.engine.pages, loop.engine.scheduler.max_num_seqs)
        self._entries: dict[str, Entry] = {}
        self._transfers: dict[str, Spans] = {}  # figures of hand-offs whose requests are in the engine now
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._cached_tokens = 0

    # ------------------------------------------------------------ messages

    def handle(self, identity: bytes, message: AnyMessage, now: float) -> None:
        if isinstance(message, Submit):
            self._submit(identity, message, now)
        elif isinstance(message, Abort):
            self._abort(request_key(message.request_id, message.choice, message.attempt))
        else:
            logger.warning("a decode worker has no use for %s", type(message).__name__)

    def peer_renewed(self, identity: bytes, now: float) -> None:
        """Nothing is lent to routers."""

    def peer_gone(self, identity: bytes) -> None:
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
        elif self._loop.peers.draining:
            self._refuse(identity, message, "unavailable", "the worker is draining", retryable=True)
        else:
            # To score a prompt all of it is computed: nothing that is cached is of use.
            known = 0 if request.wants_prompt_logprobs else shape.num_known
            hashes = shape.extend_hashes(scheduler.hash_scope, size, known)
            self._admission.submit(Entry(identity, request, message.prefill, now, list(hashes)))

    def _refuse(self, identity: bytes, message: Submit, code: str, text: str, *, retryable: bool) -> None:
        finish = Finish(reason="error", code=code, message=text, retryable=retryable)
        self._loop.replies.end(identity, message.request, finish)

    def _abort(self, key: str) -> None:
        """Free everything of a request, wherever it is. Not answered."""
        if self._admission.cancel(key) is not None:
            return
        if self._entries.pop(key, None) is not None and self._handoffs.cancel(key) is None:
            self._engine.scheduler.abort(key)
            self._transfers.pop(key, None)

    # ------------------------------------------------------------ turns

    def tick(self, now: float) -> None:
        for incarnation, event in self._handoffs.links.poll(now):
            if isinstance(event, PrefillFound):
                self._handoffs.found(event.worker)
            elif isinstance(event, PrefillLost):
                self._handoffs.lost(event)
            elif isinstance(event, PagesReady):
                self._handoffs.ticket(incarnation, event, now)
            elif isinstance(event, PrefillDone):
                self._handoffs.prefill_done(event, now)
            elif isinstance(event, PrefillFailed):
                self._handoffs.prefill_failed(event)
        for completion in self._handoffs.mover.poll_done():
            self._handoffs.completed(completion, now)
        for entry in self._admission.expired(now):
            finish = Finish(
                reason="error",
                code="queue_timeout",
                message=f"no room within {entry.request.queue_timeout_s:.0f} s",
            )
            self._loop.replies.end(entry.identity, entry.request, finish)
        self._admit(now)
        for ready in self._handoffs.take_ready():
            self._start(ready, now)

    def _admit(self, now: float) -> None:
        preempted = any(request.preemptions for request in self._engine.scheduler.waiting)
        for entry in self._admission.admit(now, len(self._entries), preempted=preempted):
            self._entries[entry.key] = entry
            remote = entry.prefill is not None and entry.num_tokens - entry.held_tokens > self._pages.page_size
            if remote or entry.held_tokens:  # else the scheduler looks, and counts, itself
                self._prefix_queries += entry.num_tokens
                self._prefix_hits += entry.held_tokens
            if remote:
                assert entry.prefill is not None
                router_id, _ = split_identity(entry.identity)
                self._handoffs.begin(entry, entry.prefill, router_id, now)
            else:
                self._cached_tokens += entry.held_tokens
                self._engine.add(entry.request, arrived=entry.arrived, computed=entry.held_tokens)

    def _start(self, ready: Ready, now: float) -> None:
        """A hand-off has ended: decode, or compute what is missing first."""
        entry = ready.entry
        first = ready.first
        if first is not None and first.undelivered is not None:
            self._loop.replies.add(entry.identity, first.undelivered)
        if first is not None and first.finish is not None:
            del self._entries[entry.key]
            self._pages.release(entry.key)
            return
        request = entry.request
        if first is not None:
            request = msgspec.structs.replace(request, output_token_ids=[*request.output_token_ids, *first.token_ids])
        # Without its first token the request still needs the logits of its last one.
        computed = ready.computed if first is not None else min(ready.computed, entry.num_tokens - 1)
        if first is None and request.wants_prompt_logprobs:  # the scores of what has landed are lost
            self._pages.release(entry.key)
            computed = 0
        self._transfers[entry.key] = ready.spans
        self._engine.add(request, arrived=entry.arrived, computed=computed)

    def stepped(self, output: StepOutput, now: float) -> None:
        for item in output.outputs:
            entry = self._entries[item.key]
            spans = item.spans and self._complete(item.spans, entry)
            if item.finish is not None:
                del self._entries[item.key]
                self._transfers.pop(item.key, None)
            self._loop.replies.add(entry.identity, to_delta(item, spans))

    def _complete(self, spans: Spans, entry: Entry) -> Spans:
        """The engine's figures of a request, with those of its admission and its hand-off."""
        transfer = self._transfers.get(entry.key, Spans())
        return msgspec.structs.replace(
            transfer,
            worker=self._loop.info.worker_id,
            queue_ms=(entry.admitted - entry.arrived) * 1e3,
            prefill_ms=spans.prefill_ms,
            decode_ms=spans.decode_ms,
            cached_tokens=entry.held_tokens,
            computed_tokens=spans.computed_tokens,
            preemptions=spans.preemptions,
        )

    def _all_entries(self) -> list[Entry]:
        return [*self._admission.entries(), *self._entries.values()]

    def give_up(self, finish: Finish) -> None:
        for entry in self._all_entries():
            request = self._engine.scheduler.get(entry.key)
            index = request.num_output if request is not None else None
            self._abort(entry.key)
            self._loop.replies.end(entry.identity, entry.request, finish, index=index)

    # ------------------------------------------------------------ figures

    def busy(self) -> bool:
        return bool(self._entries) or len(self._admission) > 0 or not self._handoffs.settled

    def load(self) -> dict[str, int]:
        counters = self._handoffs.counters
        return {
            "waiting": len(self._admission) + len(self._handoffs),
            "deferred": len(self._handoffs),
            "queued_tokens": self._admission.queued_tokens,
            "quarantined_pages": self._handoffs.quarantined_pages,
            "prefix_queries": self._prefix_queries,
            "prefix_hits": self._prefix_hits,
            "cached_tokens": self._cached_tokens,
            "asked_tokens": counters.asked_tokens,
            "received_tokens": counters.received_tokens,
            "handoffs": counters.handoffs,
            "handoff_failures": counters.handoff_failures,
            "transfer_bytes": counters.transfer_bytes,
            "transfer_pages": counters.transfer_pages,
            "checksum_failures": counters.checksum_failures,
        }

    def histograms(self) -> dict[str, list[float]]:
        return self._handoffs.counters.histograms()

    def ledger(self) -> dict[str, Any]:
        return {
            "requests": len(self._entries),
            "admission": len(self._admission),
            "handoffs": len(self._handoffs),
            "quarantined_pages": self._handoffs.quarantined_pages,
            "prefill_links": len(self._handoffs.links),
        }

    def close(self) -> bool:
        self._handoffs.links.close()
        return self._handoffs.mover.close()
