"""The engine's loop body: plan, submit, read, update. Both workers and the offline `LLM` drive it, never around it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock.common.messages import GenerateRequest, request_key
from penstock.common.rate_estimator import RateEstimator
from penstock.engine.outputs import StepOutput
from penstock.engine.pages import PageManager
from penstock.engine.plan import Executor, StepHandle, StepPlan
from penstock.engine.request import Request
from penstock.engine.scheduler import Scheduler
from penstock.engine.work_estimate import WorkEstimate


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A submitted step, and what of it says how long it should take."""

    handle: StepHandle
    submitted: float
    num_tokens: int
    sequences: int
    context_tokens: int


class Engine:
    """One scheduler and one executor. `rates` has how long the steps took."""

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Callable[[], float] = time.monotonic) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.steps = 0  # submitted
        self.stalled = False  # the last `step` could neither submit nor read: requests wait for pages of others
        self.rates = RateEstimator()
        self.estimate: WorkEstimate | None = None  # what steps should take of the device, if that is asked for
        self._in_flight: deque[_InFlight] = deque()
        self._read_at = float("-inf")

    @property
    def pages(self) -> PageManager:
        return self.scheduler.pages

    def add(self, source: GenerateRequest, *, arrived: float | None = None, computed: int = 0) -> str:
        """Queue a request and return its key. The key may hold pages already, with the first `computed` tokens in them.

        Raises:
            ValueError: it exists already, or is too long for this engine.
        """
        request = Request(source, self.clock() if arrived is None else arrived)
        self.scheduler.add(request, computed=computed)
        return request.key

    def abort(self, request_id: str, choice: int, attempt: int) -> bool:
        """Stop a request; its pages are free as soon as no submitted step writes them. False if it is not here."""
        return self.scheduler.abort(request_key(request_id, choice, attempt)) is not None

    def has_work(self) -> bool:
        """Whether requests are open, or results still have to be read."""
        return bool(self._in_flight) or self.scheduler.has_work()

    def step(self) -> StepOutput:
        """Submit the next step; then, unless the executor is to run further ahead, read the oldest one.

        Returns what the step that was read changed: nothing, if none was.

        Raises:
            Exception: what the executor raised; every step in flight is given up then.
        """
        try:
            plan = self.scheduler.plan(self.clock())
            if plan is not None:
                self._submit(plan)
            self.stalled = not self._in_flight
            if self.stalled or (plan is not None and len(self._in_flight) <= self.executor.run_ahead):
                return StepOutput()
            return self._read()
        except BaseException:
            self._give_up()
            raise

    def settle(self) -> None:
        """Read what is still in flight, for callers that have aborted every request: no page is held afterwards.

        Raises:
            Exception: as `step`.
        """
        try:
            while self._in_flight:
                self._read()
        except BaseException:
            self._give_up()
            raise

    def close(self) -> None:
        self._in_flight.clear()
        self.executor.close()

    def _submit(self, plan: StepPlan) -> None:
        submitted, context = self.clock(), self.pages.num_held * self.pages.page_size
        handle = self.executor.submit(plan)
        self._in_flight.append(_InFlight(handle, submitted, plan.num_tokens, len(plan.work), context))
        self.steps += 1
        if self.estimate is not None:
            self.estimate.add(plan)

    def _read(self) -> StepOutput:
        step = self._in_flight.popleft()
        result, now = step.handle.result(), self.clock()
        # A step that was submitted behind another one began when that one had ended.
        seconds = now - max(step.submitted, self._read_at)
        self._read_at = now
        self.rates.step(step.num_tokens, step.sequences, step.context_tokens, seconds)
        return self.scheduler.update(result, now)

    def _give_up(self) -> None:
        self._in_flight.clear()
        self.scheduler.give_up_steps()
