"""Decides what each step computes. Pure: plans out, results in; no tensors, no clock of its own.

`plan` may be called again before the results of earlier steps were given to `update`: what is still unread counts as
pending. Continuous batching with chunked prefill: sequences that decode come first, with them hand-offs that have
landed; then prompts under what is left of the token budget, by priority, then first come, first served (a prefill
worker's policy gives a long prompt that comes first more than the budget).
Without room for a decode's next page a sequence is
preempted, of those with the least priority the newest: its pages are released and it waits at their front to be
recomputed. Choices of one request share the full pages of their prompt: one computes them, the others wait for it.

What steps in flight cost:
- A request whose end by length is certain is not planned again. One that stops at a token is noticed a step late: what
  the steps after that sample for it is dropped.
- A submitted step writes its requests' pages until its result is there, whoever has ended meanwhile. Such pages pass to
  the step (`step_holder`) and are released with its result: other workers write into free pages, in no order with ours.
- Nobody is preempted while a step is in flight: `plan` says None, and is asked again with the result. So it does while
  a token of an output with a form (`Request.constraint`) is unread: what may follow depends on it.
"""

from __future__ import annotations

import sys
from collections import deque

from penstock.common.messages import Finish, Spans
from penstock.engine.draft import StepDraft
from penstock.engine.outputs import HANDED_OFF, NOTHING_ALLOWED, Output, Progress, SchedulerCounters, StepOutput
from penstock.engine.pages import PageManager
from penstock.engine.plan import PromptScores, SampledTokens, SequenceWork, StepPlan, StepResult
from penstock.engine.policy import BatchPolicy, enough_gathered
from penstock.engine.request import Request, Status
from penstock.engine.siblings import Siblings
from penstock.engine.waiting import WaitingQueue, least_urgent


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
        # What is handed off ends in the decode worker's context, which may be another.
        self._longest = sys.maxsize if policy.prefill_only else max_model_len
        self.hash_scope = hash_scope
        self.counters = SchedulerCounters()
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # in order of arrival in the batch
        self._by_key: dict[str, Request] = {}
        self._siblings = Siblings(pages)
        self._ended: list[str] = []  # keys the executor must forget
        self._in_flight: deque[tuple[StepPlan, list[Request]]] = deque()  # submitted, not read; whose work it is
        self._step = 0  # the newest one planned
        self._read = 0  # the newest one whose result is here

    # ------------------------------------------------------------ requests

    def has_work(self) -> bool:
        """Whether a request is open here; steps in flight are the engine's to count."""
        return bool(self.waiting or self.running)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        return sum(r.num_to_compute for queue in (self.waiting, self.running) for r in queue if not r.is_decoding)

    def get(self, key: str) -> Request | None:
        return self._by_key.get(key)

    def holders(self) -> set[str]:
        """For whom pages are held here: requests, and steps that still write."""
        return {*self._by_key, *(step_holder(plan.step) for plan, _ in self._in_flight)}

    def computes_for(self, request_id: str) -> bool:
        """Whether a choice of this request computes pages now that its other choices will find in the cache."""
        return self._siblings.computes_for(request_id)

    def add(self, request: Request, *, computed: int = 0) -> None:
        """Queue a request. If its key already holds pages (a hand-off landed), the first `computed` tokens are in them.

        Raises:
            ValueError: the key is in use, or the request is longer than the context.
        """
        if request.key in self._by_key:
            raise ValueError(f"request {request.key} exists already")
        known = request.num_known
        if known >= self.max_model_len:
            raise ValueError(f"{known} tokens leave no room for output in a context of {self.max_model_len}")
        max_tokens = request.source.sampling.max_tokens
        limit = self.max_model_len if max_tokens is None else min(self.max_model_len, request.prompt_len + max_tokens)
        request.limit = known + 1 if self.policy.prefill_only else max(limit, known + 1)
        request.computed = computed
        self._by_key[request.key] = request
        self.waiting.append(request, has_claim=self.pages.has_claim(request.key))

    def abort(self, key: str) -> Request | None:
        """Forget a request and release its pages, if need be with the steps that write them; unknown keys are fine."""
        request = self._by_key.get(key)
        if request is not None:
            self._end(request, Finish(reason="abort"))
        return request

    def expired(self, now: float) -> list[Request]:
        """Requests that waited longer than they may without ever having been planned."""
        return self.waiting.expired(now)

    # ------------------------------------------------------------ planning

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when there is nothing to compute, or nothing before a result has been read."""
        budget = self.max_num_batched_tokens
        while True:
            decodes, prompts, growth, unread = self._batch(budget)
            if unread:
                return None
            if growth <= self.pages.num_available:
                break
            if self._in_flight:
                return None
            self._preempt(least_urgent(self.running))
        draft = StepDraft(self._step + 1, decodes, self._decode(decodes, budget, self._step + 1))
        if self.waiting.num_claims:
            # What has landed decodes at once: behind the chunks of a prompt its client would wait for all of them.
            self._start_waiting([r for r in self.waiting if r.is_decoding], budget, draft, now)
        gathered = prompts or not draft.work or self._gathered(len(draft.work))
        budget = draft.num_tokens + self.policy.prefill_budget(budget, draft.num_tokens)
        for request in prompts:
            num_tokens = self._chunk(request, budget, draft)
            if num_tokens > 0:  # its pages were allocated when it started
                self.counters.prompt_tokens += num_tokens
                draft.go_on(request, num_tokens)
        if gathered:
            self._start_waiting(list(self.waiting), budget, draft, now)
        if not draft.work:
            return None
        self._step = draft.step
        self.counters.step_tokens.observe(draft.num_tokens)
        plan = draft.plan(self._ended)
        self._ended = []
        self._in_flight.append((plan, draft.owners))
        return plan

    def _batch(self, budget: int) -> tuple[list[Request], list[Request], int, bool]:
        """Running requests that decode within the budget, those with prompt left, and the pages the former lack.

        Also whether a token has to be read first, for what may follow it.
        """
        decodes: list[Request] = []
        prompts: list[Request] = []
        growth, unread = 0, False
        for request in self.running:
            computed = request.computed
            known = len(request.tokens) + request.pending
            if computed < known < request.limit:
                if computed < request.prompt_end:
                    prompts.append(request)
                elif request.constraint is not None and (request.pending or not request.may_go_on):
                    unread = unread or request.pending > 0
                elif budget > 0:
                    decodes.append(request)
                    end = min(known, computed + budget)
                    budget -= end - computed
                    if end > request.room:
                        growth += self.pages.pages_for(end - request.room)
        return decodes, prompts, growth, unread

    def _decode(self, requests: list[Request], budget: int, step: int) -> list[SequenceWork]:
        """The work of sequences that decode: `StepDraft.go_on` written out: a step's host time mostly goes here."""
        work: list[SequenceWork] = []
        for request in requests:
            start = request.computed
            known = len(request.tokens) + request.pending
            end = known if known - start <= budget else start + budget
            budget -= end - start
            new_pages = () if end <= request.room else self._grow(request, end)
            request.computed = end
            request.last_step = step
            if end == known:
                request.pending += 1
            mask = None if request.constraint is None else request.constraint.mask
            work.append(SequenceWork(request.key, start, end - start, new_pages, end == known, mask))
        return work

    def _grow(self, request: Request, num_tokens: int) -> tuple[int, ...]:
        """Allocate the pages that are missing for `num_tokens` tokens."""
        new_pages = self.pages.allocate(request.key, self.pages.pages_for(num_tokens - request.room))
        request.room += len(new_pages) * self.pages.page_size
        return tuple(new_pages)

    def _gathered(self, num_decodes: int) -> bool:
        """Whether the policy lets waiting prompts join the sequences that decode, now."""
        share = self.policy.gather_share
        if share <= 0.0:
            return True
        joining, num_tokens = self.waiting.with_room(
            slots=self.max_num_seqs - len(self.running),
            pages=self.pages.num_available,
            page_size=self.pages.page_size,
            num_tokens=self.max_num_batched_tokens,
        )
        return enough_gathered(
            share,
            num_decodes=num_decodes,
            joining=joining,
            left_waiting=len(self.waiting) - joining,
            fills_a_step=num_tokens >= self.max_num_batched_tokens,
        )

    def _start_waiting(self, waiting: list[Request], budget: int, draft: StepDraft, now: float) -> None:
        """Move these requests into the batch, while there is room and the step has fewer tokens than `budget`."""
        blocked = False
        for request in waiting:
            full = draft.num_tokens >= budget or len(self.running) >= self.max_num_seqs
            if full or (blocked and not self.waiting.num_claims):
                return
            if self._siblings.waits(request) or not request.may_go_on:
                continue
            # In order; but one that has pages, or a promise, may pass one that waits for them, or both wait for ever.
            if (blocked and not request.has_claim) or not self._start(request, now):
                blocked = True
                continue
            num_tokens = self._chunk(request, budget, draft)
            if not request.is_decoding:
                self.counters.prompt_tokens += num_tokens
            draft.begin(request, num_tokens, tuple(self.pages.table(request.key)))

    def _chunk(self, request: Request, budget: int, draft: StepDraft) -> int:
        """How many of its tokens a step computes that has `draft` so far; not above 0 if that is full."""
        left = request.num_to_compute
        if draft.work:
            return min(budget - draft.num_tokens, left)
        return self.policy.lone_chunk(self.max_num_batched_tokens, budget, left, request.moved_per_token)

    def _start(self, request: Request, now: float) -> bool:
        """Move a waiting request into the batch, with pages for everything known of it; False without room."""
        pages = self.pages
        needed = pages.pages_for(request.num_known)
        held = len(pages.table(request.key))
        matched: list[int] = []
        if held == 0:
            request.computed = 0
            # The last token is always computed, for its logits; to score a prompt all are.
            scores = request.scores_prompt
            matched = (
                []
                if scores
                else pages.match(request.iter_hashes(self.hash_scope, pages.page_size, request.num_known - 1))
            )
        extra = needed - held - len(matched)
        if not pages.has_room(request.key, matched, extra):
            return False
        pages.end_promise(request.key)  # first: pages found in the cache come out of it, too
        if held == 0:
            pages.hold(request.key, matched)
            request.computed = len(matched) * pages.page_size
            self.counters.prefix_queries += request.num_known
            self.counters.prefix_hits += request.computed
        if extra > 0:
            pages.allocate(request.key, extra)
        if request.first_planned is None:
            request.first_planned = now
            request.cached_tokens = request.computed
            # Of a request that goes on behind an earlier attempt its output was prompt, but for the token that comes.
            request.prompt_tokens = max(0, max(request.prompt_len, request.prompt_end) - request.computed)
            if request.is_decoding:  # a hand-off: computed elsewhere
                request.prefilled = now
        self.waiting.remove(request)
        request.status = Status.RUNNING
        request.room = len(pages.table(request.key)) * pages.page_size
        self.running.append(request)
        self._siblings.lead(request)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._siblings.stop(request)
        self.pages.release(request.key)
        request.status = Status.WAITING
        request.computed = request.pending = 0
        request.begin_prompt()
        request.preemptions += 1
        self.counters.preemptions += 1
        self._ended.append(request.key)
        self.waiting.put_back(request)

    # ------------------------------------------------------------ results

    def update(self, result: StepResult, now: float) -> StepOutput:
        """Take the oldest step's result: append tokens, name full pages, end requests. Of ended ones nothing is taken.

        Raises:
            ValueError: it is another step's result.
        """
        plan, owners = self._in_flight[0]
        if plan.step != result.step:
            raise ValueError(f"the result of step {result.step} came before that of step {plan.step}")
        self._in_flight.popleft()
        self._read = plan.step
        outputs: list[Output] = []
        progress: list[Progress] = []
        tell_progress = self.policy.prefill_only
        page_size = self.pages.page_size
        for scores in result.prompts:
            self._note_scores(scores)
        results = iter(result.sampled)
        sampled = next(results, None)
        for work, request in zip(plan.work, owners, strict=True):
            new = None
            if sampled is not None and sampled.key == work.key:
                new, sampled = sampled, next(results, None)
            if request.status is Status.FINISHED:
                continue
            done = work.start + work.num_tokens
            if done % page_size < work.num_tokens:
                self._name_pages(request, work.start, done)
                if self._siblings and done >= self._siblings.shared_tokens(request):
                    self._siblings.stop(request)
            if tell_progress:
                progress.append(Progress(work.key, done))
            if work.samples:
                output = self._append(request, new, now)
                if output is not None:
                    outputs.append(output)
        self.pages.release(step_holder(plan.step))
        return StepOutput(tuple(outputs), tuple(progress))

    def _note_scores(self, scores: PromptScores) -> None:
        request = self._by_key.get(scores.key)
        if request is not None and request.scores_prompt:
            request.prompt_scores[scores.start - 1 :] = scores.logprobs  # again from the front after a preemption

    def give_up_steps(self) -> None:
        """The results of all submitted steps will never come, and none of them writes any more."""
        for plan, _ in self._in_flight:
            self.pages.release(step_holder(plan.step))
        self._in_flight.clear()
        self._read = self._step

    def _name_pages(self, request: Request, start: int, done: int) -> None:
        size = self.pages.page_size
        done = min(done, len(request.tokens))
        table = self.pages.table(request.key)
        hashes = request.extend_hashes(self.hash_scope, size, done)
        for index in range(start // size, done // size):
            self.pages.name(table[index], hashes[index], hashes[index - 1] if index else b"")

    def _append(self, request: Request, sampled: SampledTokens | None, now: float) -> Output | None:
        """Add what one step sampled for a request; None if that was nothing."""
        tokens = request.tokens
        known = len(tokens)
        request.pending -= 1
        if sampled is None or not sampled.token_ids:
            if request.pending == 0:  # its last token is to be computed again, for its logits
                request.computed = min(request.computed, known - 1)
            return None
        token_ids, logprobs = sampled.token_ids, sampled.logprobs
        finish: Finish | None = None
        if (request.constraint is not None or request.has_rules) and request.excludes(token_ids[0]):
            token_ids, finish = (), NOTHING_ALLOWED
        for token in token_ids:
            tokens.append(token)
            if len(tokens) >= request.limit or token in request.end_ids:
                finish = request.finish_after(token, self._longest)
                if finish is not None:
                    break
        spans: Spans | None = None
        prompt_logprobs = tuple(request.prompt_scores) if request.scores_prompt else None
        if finish is not None or not request.reported:  # its first or its last
            finish, spans = self._report(request, finish, now)
            token_ids = token_ids[: len(tokens) - known]
            logprobs = None if logprobs is None else logprobs[: len(token_ids)]
        self.counters.generation_tokens += len(token_ids)
        index = known - request.prompt_len
        return Output(request.source, request.key, index, token_ids, logprobs, finish, spans, prompt_logprobs)

    def end(self, request: Request, finish: Finish, now: float) -> Output:
        """End a request that has nothing in flight, without a new token."""
        scored = request.scores_prompt and len(request.prompt_scores) == request.prompt_len - 1
        scores = tuple(request.prompt_scores) if scored else None  # it may end before its prompt was computed
        told, spans = self._report(request, finish, now)
        return Output(request.source, request.key, request.num_output, (), None, told, spans, scores)

    def _report(self, request: Request, finish: Finish | None, now: float) -> tuple[Finish | None, Spans]:
        """Note that a request has begun or has ended; why it ended, and its part of the timeline."""
        request.reported = True
        if request.prefilled is None:
            request.prefilled = now
        if finish is None and self.policy.prefill_only:
            finish = HANDED_OFF
        if finish is not None:
            self._end(request, finish)
        return finish, request.spans(now)

    def _end(self, request: Request, finish: Finish) -> None:
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._ended.append(request.key)
        else:
            self.waiting.remove(request)
        self._siblings.stop(request)
        request.status = Status.FINISHED
        request.finish = finish
        in_flight = request.last_step > self._read
        if finish is HANDED_OFF:
            assert not in_flight, "a step writes pages that are handed off"
        elif in_flight:
            self.pages.move_all(request.key, step_holder(request.last_step))
        else:
            self.pages.release(request.key)
        del self._by_key[request.key]


def step_holder(step: int) -> str:
    """Holder of pages whose owners have ended while this step, not read yet, may write them."""
    return f"step {step}"
