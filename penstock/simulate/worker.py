"""A virtual worker: a queue of prompts, a batch that decodes, and a cache of pages. Pure; the clock is passed in.

One prompt is computed at a time, in chunks, in order of arrival, as engine/scheduler.py does: it begins when the step
under way has ended, and its chunks are shorter beside sequences that decode. A step that has a chunk also moves every
running sequence on by a token, and takes the time of both; a step without takes what its sequences take. Time is not
stepped through: between two changes all steps are alike, so that a change costs the same whether ten or ten thousand
steps lie before it. Milliseconds throughout.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field

from penstock.engine.policy import BatchPolicy
from penstock.router.policy import EXPECTED_OUTPUT_TOKENS
from penstock.router.rates import WorkerRates
from penstock.simulate.page_cache import PageCache
from penstock.simulate.trace import TracedRequest

STEP_TOKENS = 8192  # of a prompt in one step: the engine's default on a GPU
_STEP_ENDS = 1e-6  # of a step: so near to a whole number of them one has just ended
_NEVER = math.inf


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the fleet."""

    request: TracedRequest
    decode: int  # the worker that decodes it
    prefill: int  # the worker that computes its prompt; the same one in one phase
    unnamed: int  # pages that it needs beside those with names
    source_pages: int = 0  # pages from the first that come from another worker
    ready_ms: float = 0.0  # when those have come
    decode_tokens: int = 0  # reserved at the decode worker until it ends
    prefill_tokens: int = 0  # reserved at the other until its first token
    decode_held: int = 0  # pages from the first that the decode worker need not read
    given_ms: float = 0.0  # work of decoding it, as it counts at the decode worker
    expected_tokens: int = EXPECTED_OUTPUT_TOKENS  # of its output; twice as many whenever there are more
    hit_tokens: int = 0
    fetched_tokens: int = 0  # of those, read from another worker
    computed_tokens: int = 0
    known_pages: int = 0  # from the first: the worker held them already
    started_ms: float = 0.0
    first_ms: float = 0.0
    joined_ms: float = 0.0
    last_ms: float = 0.0
    gap_ms: float = 0.0  # the longest between two tokens


@dataclass(slots=True)
class StepTimes:
    """How long steps took, weighted by the tokens they produced, in bins of 1 %."""

    bins: dict[int, float] = field(default_factory=dict)

    def add(self, step_ms: float, tokens: float) -> None:
        """`tokens` more came after `step_ms` each."""
        place = int(math.log(step_ms) * 100)
        self.bins[place] = self.bins.get(place, 0.0) + tokens

    def quantile(self, share: float) -> float:
        """The step time that `share` of the tokens did not exceed; 0 without tokens."""
        wanted = share * sum(self.bins.values())
        for place, tokens in sorted(self.bins.items()):
            wanted -= tokens
            if wanted <= 0:
                return math.exp((place + 0.5) / 100)
        return 0.0


class VirtualWorker:
    """The state of one worker at `now`, and when it changes next."""

    def __init__(
        self,
        number: int,
        rates: WorkerRates,
        num_pages: int,
        max_num_seqs: int,
        times: StepTimes,
        policy: BatchPolicy,
        step_tokens: int = STEP_TOKENS,
        moved_per_token: float = math.inf,
    ) -> None:
        """moved_per_token: of how many tokens the pages move to a decode worker while one is computed."""
        self.number = number
        self.rates = rates
        self.cache = PageCache(num_pages)
        self.queue: deque[Job] = deque()  # prompts to compute
        self.admission: deque[Job] = deque()  # decoded here, computed elsewhere, without room so far
        self.admitted = 0  # sequences that hold a slot: being computed, handed off or decoded
        self.running: list[tuple[int, int, Job]] = []  # a heap by the step of the last token
        self._outgrowing: list[tuple[int, int, Job]] = []  # a heap by the step of the token that was not expected
        self.current: Job | None = None
        self.work_ms = 0.0  # of prompts, and of sequences in steps: what it was given to do so far
        self.link_free_ms = 0.0
        self.version = 0  # of its next event: older ones are void
        self._max_num_seqs = max_num_seqs
        self._policy, self._step_tokens, self._moved_per_token = policy, step_tokens, moved_per_token
        self._longest: list[tuple[float, float]] = []  # (end, step) in time, without those that a longer one followed
        self._times = times
        self._context_tokens = 0.0
        self._now_ms = 0.0
        self._steps = 0.0  # since the beginning; whole when one has just ended, and whenever nothing runs
        self._chunks_left = 0.0  # of the current prompt
        self._chunk_tokens = 0.0  # in one of them
        self._chunk_ms = 0.0  # computing it
        self._joined = 0

    def advance(self, now_ms: float) -> None:
        """Let time pass; nothing may end before `now_ms`."""
        passed_ms, self._now_ms = now_ms - self._now_ms, now_ms
        if passed_ms <= 0 or (self.current is None and not self.running):
            return
        step_ms = self._step_ms()
        steps = passed_ms / step_ms
        self._steps += steps
        if self.current is not None:
            self._chunks_left -= steps
        if self.running:
            self._times.add(step_ms, steps * len(self.running))
            while self._longest and self._longest[-1][1] <= step_ms:
                self._longest.pop()
            self._longest.append((now_ms, step_ms))

    def next_ms(self) -> float:
        """When the current prompt, or a sequence, ends, or the next prompt's pages have come; infinity: never."""
        step_ms = self._step_ms()
        steps = _NEVER
        if self.current is not None:
            steps = max(0.0, self._chunks_left)
        if self.running:
            steps = min(steps, max(0.0, self.running[0][0] - self._steps))
            if self._outgrowing:
                steps = min(steps, max(0.0, self._outgrowing[0][0] - self._steps))
        ends_ms = self._now_ms + steps * step_ms
        if self.current is None and self.queue:
            if self.queue[0].ready_ms > self._now_ms:
                ends_ms = min(ends_ms, self.queue[0].ready_ms)
            elif self._left_of_step() and self.has_room(self.queue[0]):
                ends_ms = min(ends_ms, self._now_ms + self._left_of_step() * step_ms)
        return ends_ms

    def _left_of_step(self) -> float:
        """What is left of the step under way: from 0 to 1."""
        if not self.running and self.current is None:
            return 0.0
        left = math.ceil(self._steps - _STEP_ENDS) - self._steps
        return left if left > _STEP_ENDS else 0.0

    def has_room(self, job: Job) -> bool:
        """A slot and pages for this job are free."""
        return self.admitted < self._max_num_seqs and self.cache.fits(job.request.pages, job.unnamed)

    def begin(self, page_tokens: int) -> list[int] | None:
        """Start the next prompt if there is one and room for it, between two steps; returns evicted pages, or None."""
        if self.current is not None or not self.queue or self._left_of_step():
            return None
        job = self.queue[0]
        if job.ready_ms > self._now_ms or not self.has_room(job):
            return None
        self.queue.popleft()
        self.current = job
        prompt = job.request.prompt_tokens
        job.known_pages = self.cache.run(job.request.pages)
        # The last token is always computed: its logits are wanted.
        job.hit_tokens = min(max(job.known_pages, job.source_pages) * page_tokens, prompt - 1)
        job.fetched_tokens = max(0, job.hit_tokens - job.known_pages * page_tokens)
        job.computed_tokens = prompt - job.hit_tokens
        job.started_ms = self._now_ms
        self.admitted += 1
        evicted = self.cache.hold(job.request.pages, job.unnamed)
        self._cut(job.computed_tokens)
        self.work_ms += self._chunks_left * self._chunk_ms
        return evicted

    def _cut(self, tokens: float) -> None:
        """Into chunks: so many tokens are left of the current prompt."""
        self._chunks_left = float(self._num_chunks(max(1, math.ceil(tokens))))
        self._chunk_tokens = tokens / self._chunks_left
        self._chunk_ms = self.rates.prefill_ms(self._chunk_tokens)

    def _num_chunks(self, left: int) -> int:
        """In how many steps so many tokens of a prompt are computed."""
        budget = self._policy.prefill_budget(self._step_tokens, len(self.running))
        if self.running:
            return math.ceil(left / budget)
        chunks = 0
        while left > 0:
            left -= self._policy.lone_chunk(self._step_tokens, budget, left, self._moved_per_token)
            chunks += 1
        return chunks

    def computed(self) -> Job | None:
        """The current prompt, if it is complete now; it is the current one no longer."""
        job = self.current
        if job is None or self._chunks_left > _STEP_ENDS:
            return None
        self.current = None
        return job

    def join(self, job: Job) -> None:
        """Decode it from now on; its first token has come."""
        request = job.request
        self._joined += 1
        job.joined_ms = self._now_ms
        job.gap_ms = self._now_ms - job.first_ms + self._left_of_step() * self._step_ms()
        if job.gap_ms > 0:
            self._times.add(job.gap_ms, 1.0)
        first = math.ceil(self._steps - _STEP_ENDS)
        heapq.heappush(self.running, (first + request.output_tokens - 1, self._joined, job))
        if request.output_tokens > job.expected_tokens:
            heapq.heappush(self._outgrowing, (first + job.expected_tokens, self._joined, job))
        if self.current is not None and len(self.running) == 1:  # what is left of the prompt is beside others now
            self._cut(self._chunks_left * self._chunk_tokens)
            self._steps = float(math.ceil(self._steps - _STEP_ENDS))
        context = _mean_context(request)
        self._context_tokens += context
        self.work_ms += decode_work_ms(request, self.rates)

    def outgrown(self) -> list[Job]:
        """Sequences that have just got longer than expected: they are expected to get twice as long."""
        found = []
        while self._outgrowing and self._outgrowing[0][0] - self._steps <= _STEP_ENDS:
            step, number, job = heapq.heappop(self._outgrowing)
            if job.request.output_tokens > 2 * job.expected_tokens:
                heapq.heappush(self._outgrowing, (step + job.expected_tokens, number, job))
            job.expected_tokens *= 2
            found.append(job)
        return found

    def ended(self) -> list[Job]:
        """Sequences whose last token has come, taken out of the batch."""
        found = []
        while self.running and self.running[0][0] - self._steps <= _STEP_ENDS:
            job = heapq.heappop(self.running)[2]
            place = bisect_right(self._longest, (job.joined_ms, _NEVER))
            job.gap_ms = max([job.gap_ms, *(step_ms for _, step_ms in self._longest[place : place + 1])])
            self._context_tokens = self._context_tokens - _mean_context(job.request) if self.running else 0.0
            found.append(job)
        if not self.running:
            self._longest.clear()
        return found

    def release(self, job: Job) -> None:
        """Give back its slot and pages."""
        self.admitted -= 1
        self.cache.release(job.request.pages, job.unnamed)

    def _step_ms(self) -> float:
        step_ms = self.rates.step_ms(len(self.running), self._context_tokens)
        # What a chunk is measured to take includes reading the weights.
        return step_ms if self.current is None else self._chunk_ms + step_ms - self.rates.decode_step_ms


def decode_work_ms(request: TracedRequest, rates: WorkerRates) -> float:
    """What this request adds to the steps that it is part of."""
    return rates.output_ms(request.prompt_tokens, request.output_tokens)


def _mean_context(request: TracedRequest) -> float:
    return request.prompt_tokens + request.output_tokens / 2
