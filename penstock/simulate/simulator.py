"""The fleet under a virtual clock: arrivals go through a policy to virtual workers, whose events come from one heap.

Pure: requests in, a `PolicyResult` out; the same arguments give the same result. A request costs four events and one
walk over its pages, whatever the number of workers.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.common.config import TWO_PHASE_MIXED_CHUNK_TOKENS
from penstock.common.errors import ConfigError
from penstock.engine.policy import BatchPolicy, DecodePolicy, PrefillPolicy
from penstock.router.policy import Placement, Policy
from penstock.router.rates import H200_LLAMA8B, WorkerRates
from penstock.simulate.fleet_view import FleetView, virtual_infos
from penstock.simulate.prefix_index import PrefixIndex
from penstock.simulate.result import PolicyResult, Slo, summary
from penstock.simulate.trace import TracedRequest
from penstock.simulate.worker import STEP_TOKENS, Job, StepTimes, VirtualWorker

LLAMA8B_TOKEN_BYTES = 128 << 10  # KV: 32 layers, 8 heads of 128, two bytes, keys and values


@dataclass(frozen=True)
class FleetShape:
    """The virtual fleet. With `prefill_workers` the others decode, and compute the prompts that a policy gives them."""

    workers: int
    pages_per_worker: int
    page_tokens: int = 512
    prefill_workers: int = 0
    max_num_seqs: int = 256
    token_bytes: int = LLAMA8B_TOKEN_BYTES
    rates: WorkerRates = H200_LLAMA8B
    max_num_batched_tokens: int = STEP_TOKENS  # of prompts in one step
    mixed_chunk_tokens: int | None = None  # beside sequences that decode; None: as `penstock serve` sets it

    def __post_init__(self) -> None:
        for name in (
            "workers",
            "pages_per_worker",
            "page_tokens",
            "max_num_seqs",
            "token_bytes",
            "max_num_batched_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mixed_chunk_tokens is not None and self.mixed_chunk_tokens < 1:
            raise ConfigError(f"mixed_chunk_tokens must be at least 1, got {self.mixed_chunk_tokens}")
        if not 0 <= self.prefill_workers < self.workers:
            raise ConfigError(
                f"prefill_workers must be from 0 to one less than the {self.workers} workers, "
                f"got {self.prefill_workers}: every request ends on a decode worker"
            )

    def batch_policy(self, number: int) -> BatchPolicy:
        """What a worker computes in a step, as `penstock serve` sets it up."""
        if number < self.prefill_workers:
            return PrefillPolicy()
        default = TWO_PHASE_MIXED_CHUNK_TOKENS if self.prefill_workers else None
        return DecodePolicy(mixed_chunk_tokens=self.mixed_chunk_tokens or default)

    @property
    def decode_workers(self) -> int:
        """Workers that decode (and, without prefill workers, compute prompts)."""
        return self.workers - self.prefill_workers


class Simulator:
    """One run of one policy."""

    def __init__(self, shape: FleetShape, policy: Policy) -> None:
        self._shape = shape
        self._policy = policy
        self._index = PrefixIndex()
        self._times = StepTimes()
        self._workers = [
            VirtualWorker(
                number,
                shape.rates,
                shape.pages_per_worker,
                shape.max_num_seqs,
                self._times,
                shape.batch_policy(number),
                shape.max_num_batched_tokens,
                shape.rates.link_bytes_per_s / (shape.token_bytes * shape.rates.prefill_tokens_per_s),
            )
            for number in range(shape.workers)
        ]
        infos = virtual_infos(
            shape.workers,
            shape.prefill_workers,
            shape.pages_per_worker,
            shape.page_tokens,
            shape.token_bytes,
            shape.max_num_seqs,
            shape.max_num_batched_tokens,
            shape.batch_policy(shape.prefill_workers).prefill_budget(shape.max_num_batched_tokens, 1),
        )
        self._view = FleetView(self._workers, policy, self._index, infos, shape.rates)
        # (when, order of entry, worker, version of that event, or the job that lands)
        self._events: list[tuple[float, int, int, int | Job]] = []
        self._entered = 0
        self._jobs: list[Job] = []  # in order of arrival

    def run(self, requests: Sequence[TracedRequest], slo: Slo) -> PolicyResult:
        """Serve requests, which are in order of arrival, to the last token.

        Raises:
            ConfigError: one of them needs more pages than a worker has.
        """
        for request in requests:
            self._until(request.arrival_ms)
            self._arrive(request)
        self._until(float("inf"))
        assert all(job.last_ms for job in self._jobs), "every request ends"
        assert not any(worker.admitted or worker.cache.held for worker in self._workers), "what is held is released"
        assert not self._view.reserved, "what is reserved is released"
        assert self._index.entries() == sum(worker.cache.cached for worker in self._workers), "the index is exact"
        shape = self._shape
        roles = (self._workers[: shape.prefill_workers], self._workers[shape.prefill_workers :])
        loads = [[worker.work_ms for worker in role] for role in roles if role]
        return summary(self._policy.name, self._jobs, loads, self._times, slo)

    def computed(self) -> list[int]:
        """Of each request's prompt the tokens that were computed in the run, in order of arrival."""
        return [job.computed_tokens for job in self._jobs]

    def _until(self, now_ms: float) -> None:
        events = self._events
        while events and events[0][0] <= now_ms:
            at_ms, _, number, what = heapq.heappop(events)
            worker = self._workers[number]
            if isinstance(what, Job):
                worker.advance(at_ms)
                self._joins(worker, what, at_ms)
                self._move_on(worker, at_ms)
            elif what == worker.version:
                worker.advance(at_ms)
                self._move_on(worker, at_ms)

    def _arrive(self, request: TracedRequest) -> None:
        now_ms = request.arrival_ms
        job = self._job(request, self._view.choose(request.pages, request.prompt_tokens))
        self._jobs.append(job)
        decoder, prefiller = self._workers[job.decode], self._workers[job.prefill]
        decoder.advance(now_ms)
        if prefiller is decoder:
            decoder.queue.append(job)
        else:
            decoder.admission.append(job)
        self._move_on(decoder, now_ms)

    def _job(self, request: TracedRequest, placement: Placement) -> Job:
        shape, view = self._shape, self._view
        total = -(-(request.prompt_tokens + request.output_tokens) // shape.page_tokens)
        if total > shape.pages_per_worker:
            raise ConfigError(
                f"a request of {request.prompt_tokens} + {request.output_tokens} tokens needs {total} pages, "
                f"a worker has {shape.pages_per_worker}"
            )
        decode = view.number(placement.decode, 0)
        prefill = view.number(placement.prefill, decode)
        job = Job(request, decode, prefill, total - len(set(request.pages)), prefill_tokens=placement.prefill_tokens)
        if placement.source is not None:
            lacking = self._workers[prefill].cache.run(request.pages)
            job.source_pages = placement.source_tokens // shape.page_tokens
            size_bytes = max(0, job.source_pages - lacking) * shape.page_tokens * shape.token_bytes
            job.ready_ms = self._moved(
                [self._workers[prefill], self._workers[view.number(placement.source, 0)]],
                request.arrival_ms,
                size_bytes,
            )
        view.reserve(decode, placement.decode_tokens)
        view.given(prefill, placement.prefill_ms)
        view.given(decode, placement.decode_ms)
        job.given_ms = placement.decode_ms
        view.reserve(prefill, placement.prefill_tokens, prompt=True)
        job.decode_tokens = placement.decode_tokens
        return job

    def _moved(self, ends: Sequence[VirtualWorker], from_ms: float, size_bytes: float) -> float:
        """Use the links at both ends for so many bytes; returns when they have come."""
        begin_ms = max(from_ms, *(worker.link_free_ms for worker in ends))
        end_ms = begin_ms + self._shape.rates.move_ms(size_bytes)
        for worker in ends:
            worker.link_free_ms = end_ms
        return end_ms

    def _move_on(self, worker: VirtualWorker, now_ms: float) -> None:
        """Everything that can happen at this worker now, and the time of its next event."""
        job = worker.computed()
        if job is not None:
            self._first_token(worker, job, now_ms)
        for longer in worker.outgrown():
            self._counts(worker, longer, longer.expected_tokens)
        for ended in worker.ended():
            self._ends(worker, ended, now_ms)
        while worker.admission and worker.has_room(worker.admission[0]):
            self._admit(worker, worker.admission.popleft(), now_ms)
        self._begin(worker)
        self._view.changed(worker.number)
        self._schedule(worker)

    def _schedule(self, worker: VirtualWorker) -> None:
        worker.version += 1
        next_ms = worker.next_ms()
        if next_ms < float("inf"):
            self._enter(next_ms, worker.number, worker.version)

    def _enter(self, at_ms: float, number: int, what: int | Job) -> None:
        self._entered += 1
        heapq.heappush(self._events, (at_ms, self._entered, number, what))

    def _begin(self, worker: VirtualWorker) -> None:
        evicted = worker.begin(self._shape.page_tokens)
        if evicted is None or worker.current is None:
            return
        for page in evicted:
            self._index.remove(page, worker.number)
        job = worker.current
        self._view.looked_up(job.request.prompt_tokens, job.hit_tokens)

    def _admit(self, decoder: VirtualWorker, job: Job, now_ms: float) -> None:
        """The decode worker has room for a hand-off: its prompt may be computed."""
        job.decode_held = decoder.cache.run(job.request.pages)
        decoder.admitted += 1
        for page in decoder.cache.hold(job.request.pages, job.unnamed):
            self._index.remove(page, decoder.number)
        prefiller = self._workers[job.prefill]
        prefiller.advance(now_ms)
        prefiller.queue.append(job)
        self._begin(prefiller)
        self._schedule(prefiller)

    def _first_token(self, worker: VirtualWorker, job: Job, now_ms: float) -> None:
        job.first_ms = now_ms
        self._view.reserve(worker.number, -job.prefill_tokens, prompt=True)
        for page in job.request.pages[job.known_pages :]:
            self._index.add(page, worker.number)
        if job.decode == worker.number:
            self._joins(worker, job, now_ms)
            return
        worker.release(job)
        decoder, shape = self._workers[job.decode], self._shape
        missing = max(0, job.request.prompt_tokens - job.decode_held * shape.page_tokens)
        all_ms = self._moved([decoder], job.started_ms, missing * shape.token_bytes)
        last = shape.batch_policy(worker.number).prefill_budget(shape.max_num_batched_tokens, 0)
        last_ms = now_ms + shape.rates.move_ms(min(missing, last) * shape.token_bytes)
        self._enter(max(all_ms, last_ms), job.decode, job)

    def _joins(self, worker: VirtualWorker, job: Job, now_ms: float) -> None:
        if job.prefill != job.decode:
            for page in job.request.pages[job.decode_held :]:
                self._index.add(page, worker.number)
        worker.join(job)

    def _ends(self, worker: VirtualWorker, job: Job, now_ms: float) -> None:
        job.last_ms = now_ms
        worker.release(job)
        self._view.reserve(worker.number, -job.decode_tokens)
        self._counts(worker, job, job.request.output_tokens)

    def _counts(self, worker: VirtualWorker, job: Job, output_tokens: int) -> None:
        """Its output counts as so long from now on."""
        work_ms = worker.rates.output_ms(job.request.prompt_tokens, output_tokens)
        self._view.given(worker.number, work_ms - job.given_ms)
        job.given_ms = work_ms
