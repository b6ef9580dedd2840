"""Decides what each step computes. Pure: plans out, results in; no tensors, no clock of its own.

`plan` may be called again before the last step's result was given to `update`: what is still unread counts as pending.
Continuous batching with chunked prefill: sequences that decode come first, then prompts under what is left of the
token budget, first come, first served. Without room for a decode's next page the newest sequence is preempted: its
pages are released and it waits at the front to be recomputed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from penstock.common.messages import Finish, GenerateRequest, Spans, TokenLogprobs
from penstock.engine.pages import NoRoom, PageManager
from penstock.engine.plan import SequenceStart, SequenceWork, StepPlan, StepResult
from penstock.engine.policy import BatchPolicy
from penstock.engine.request import Request, Status

HANDED_OFF = Finish(reason="handoff")
"""End of a request on a prefill worker: its pages stay held by its key, for the hand-off to release."""


@dataclass(frozen=True)
class Output:
    """New tokens of one request; `index` counts output tokens, those of earlier attempts included."""

    request: GenerateRequest
    key: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish: Finish | None
    spans: Spans | None  # with the first and the last output


@dataclass(frozen=True)
class Progress:
    """The K/V of the first `computed` tokens of a request are in its pages now."""

    key: str
    computed: int


@dataclass(frozen=True)
class StepOutput:
    """What a step changed, in plan order."""

    outputs: tuple[Output, ...] = ()
    progress: tuple[Progress, ...] = ()


@dataclass
class SchedulerCounters:
    """Since the start of the worker."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


class Scheduler:
    """Queues, budget and pages of one engine."""

    def __init__(
        self,
        pages: PageManager,
        policy: BatchPolicy,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        hash_scope: str,
    ) -> None:
        if max_model_len > pages.num_pages * pages.page_size:
            raise ValueError(f"{pages.num_pages} pages cannot hold one request of {max_model_len} tokens")
        self.pages = pages
        self.policy = policy
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.hash_scope = hash_scope
        self.counters = SchedulerCounters()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival in the batch
        self._by_key: dict[str, Request] = {}
        self._ended: list[str] = []  # keys the executor must forget
        self._plans: dict[int, tuple[StepPlan, list[int]]] = {}  # submitted, not yet updated; preemptions at that time
        self._step = 0

    # ------------------------------------------------------------ requests

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def get(self, key: str) -> Request | None:
        return self._by_key.get(key)

    def add(self, request: Request, *, computed: int = 0) -> None:
        """Queue a request. If its key already holds pages (a hand-off landed), the first `computed` tokens are in them.

        Raises:
            ValueError: the key is in use, or the request is longer than the context.
        """
        if request.key in self._by_key:
            raise ValueError(f"request {request.key} exists already")
        if request.num_known >= self.max_model_len:
            raise ValueError(
                f"{request.num_known} tokens leave no room for output in a context of {self.max_model_len}"
            )
        request.computed = computed
        self._by_key[request.key] = request
        self.waiting.append(request)

    def abort(self, key: str) -> Request | None:
        """Forget a request and release its pages now; unknown keys are fine."""
        request = self._by_key.get(key)
        if request is not None:
            self._end(request, Finish(reason="abort"))
        return request

    def expired(self, now: float) -> list[Request]:
        """Requests that waited longer than they may without ever having been planned."""
        return [
            request
            for request in self.waiting
            if request.first_planned is None and now - request.arrived > request.source.queue_timeout_s
        ]

    # ------------------------------------------------------------ planning

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when there is nothing to compute."""
        budget = self.max_num_batched_tokens
        work: list[SequenceWork] = []
        started: list[SequenceStart] = []
        for request in [r for r in self.running if r.is_decoding]:
            if budget > 0 and request.status is Status.RUNNING and self._make_room(request, request.num_to_compute):
                work.append(self._work(request, request.num_to_compute, now))
                budget -= 1
        work = [item for item in work if self._by_key[item.key].status is Status.RUNNING]  # preempted meanwhile
        budget = min(budget, self.policy.prefill_budget(self.max_num_batched_tokens, len(work)))
        for request in [r for r in self.running if not r.is_decoding and r.num_to_compute > 0]:
            chunk = min(budget, request.num_to_compute)
            if chunk > 0:  # its pages were allocated when it started
                work.append(self._work(request, chunk, now))
                budget -= chunk
        blocked = False
        for request in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_num_seqs:
                break
            # In order; but one that has pages, or a promise, may pass one that waits for them, or both wait for ever.
            if (blocked and not self.pages.has_claim(request.key)) or not self._start(request):
                blocked = True
                continue
            started.append(_sequence_start(request))
            chunk = min(budget, request.num_to_compute)
            work.append(self._work(request, chunk, now, first=True))
            budget -= chunk
        if not work and not self._ended:
            return None
        self._step += 1
        plan = StepPlan(self._step, tuple(self._ended), tuple(started), tuple(work))
        self._ended = []
        self._plans[plan.step] = plan, [self._by_key[item.key].preemptions for item in work]
        return plan

    def _start(self, request: Request) -> bool:
        """Move a waiting request into the batch, with pages for everything known of it; False without room."""
        pages = self.pages
        needed = pages.pages_for(request.num_known)
        held = len(pages.table(request.key))
        matched: list[int] = []
        if held == 0:
            request.computed = 0
            # The last token is always computed, for its logits.
            hashes = request.extend_hashes(self.hash_scope, pages.page_size, request.num_known - 1)
            matched = pages.match(hashes)
        extra = needed - held - len(matched)
        if not pages.has_room(request.key, matched, extra):
            return False
        if held == 0:
            pages.hold(request.key, matched)
            request.computed = len(matched) * pages.page_size
            self.counters.prefix_queries += request.num_known
            self.counters.prefix_hits += request.computed
        if extra > 0:
            pages.allocate(request.key, extra)
        pages.end_promise(request.key)
        if request.first_planned is None:
            request.cached_tokens = request.computed
        self.waiting.remove(request)
        request.status = Status.RUNNING
        self.running.append(request)
        return True

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Allocate the pages for the next tokens, preempting newer sequences; False if `request` itself had to go."""
        missing = self.pages.pages_for(request.computed + num_tokens) - len(self.pages.table(request.key))
        while missing > 0:
            try:
                self.pages.allocate(request.key, missing)
                return True
            except NoRoom:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.pages.release(request.key)
        request.status = Status.WAITING
        request.computed = request.pending = 0
        request.preemptions += 1
        self.counters.preemptions += 1
        self._ended.append(request.key)
        self.waiting.appendleft(request)

    def _work(self, request: Request, num_tokens: int, now: float, *, first: bool = False) -> SequenceWork:
        if request.first_planned is None:
            request.first_planned = now
            if request.is_decoding:  # a hand-off: computed elsewhere
                request.prefilled = now
        table = self.pages.table(request.key)
        known_pages = 0 if first else request.planned_pages
        request.planned_pages = len(table)
        if not request.is_decoding:
            self.counters.prompt_tokens += num_tokens
        start = request.computed
        request.computed += num_tokens
        samples = request.num_to_compute == 0
        request.pending += samples
        return SequenceWork(request.key, start, num_tokens, tuple(table[known_pages:]), samples)

    # ------------------------------------------------------------ results

    def update(self, result: StepResult, now: float) -> StepOutput:
        """Take a step's result: append tokens, name full pages, end requests. Ended or preempted ones are ignored."""
        plan, preemptions = self._plans.pop(result.step)
        outputs: list[Output] = []
        progress: list[Progress] = []
        live: dict[str, Request] = {}
        for work, preempted in zip(plan.work, preemptions, strict=True):
            request = self._by_key.get(work.key)
            if request is not None and request.preemptions == preempted:
                live[work.key] = request
                done = work.start + work.num_tokens
                self._name_pages(request, work.start, done)
                progress.append(Progress(work.key, done))
        for sampled in result.sampled:
            if sampled.key in live:
                outputs.append(self._append(live[sampled.key], sampled.token_ids, sampled.logprobs, now))
        return StepOutput(tuple(outputs), tuple(progress))

    def give_up_steps(self) -> None:
        """The results of all submitted steps will never come, and none of them writes any more."""
        self._plans.clear()

    def _name_pages(self, request: Request, start: int, done: int) -> None:
        size = self.pages.page_size
        if done // size > start // size:
            table = self.pages.table(request.key)
            hashes = request.extend_hashes(self.hash_scope, size, done)
            for index in range(start // size, done // size):
                self.pages.name(table[index], hashes[index])

    def _append(
        self, request: Request, tokens: Iterable[int], logprobs: tuple[TokenLogprobs, ...] | None, now: float
    ) -> Output:
        index = request.num_output
        kept: list[int] = []
        finish: Finish | None = None
        if request.prefilled is None:
            request.prefilled = now
        request.pending -= 1
        for token in tokens:
            request.tokens.append(token)
            kept.append(token)
            finish = request.finish_after(token, self.max_model_len)
            if finish is not None:
                break
        self.counters.generation_tokens += len(kept)
        if finish is None and self.policy.prefill_only:
            finish = HANDED_OFF
        if finish is not None:
            self._end(request, finish)
        spans = None if finish is None and request.reported else request.spans(now)
        request.reported = True
        return Output(
            request=request.source,
            key=request.key,
            index=index,
            token_ids=tuple(kept),
            logprobs=None if logprobs is None else logprobs[: len(kept)],
            finish=finish,
            spans=spans,
        )

    def _end(self, request: Request, finish: Finish) -> None:
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._ended.append(request.key)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        request.finish = finish
        if finish is not HANDED_OFF:
            self.pages.release(request.key)
        del self._by_key[request.key]


def _sequence_start(request: Request) -> SequenceStart:
    return SequenceStart(
        key=request.key,
        tokens=tuple(request.tokens),
        prompt_len=request.prompt_len,
        sampling=request.source.sampling,
        choice=request.source.choice,
        eos_token_ids=tuple(request.source.eos_token_ids),
    )
