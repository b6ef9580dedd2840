"""The engine's loop body: plan, submit, read, update. Both workers and the offline `LLM` drive it, never around it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock.common.messages import GenerateRequest, request_key
from penstock.common.rate_estimator import RateEstimator
from penstock.engine.constraints import Constraint, Constraints
from penstock.engine.outputs import Output, StepOutput
from penstock.engine.pages import PageManager
from penstock.engine.plan import Executor, StepHandle, StepPlan
from penstock.engine.request import Request, Status
from penstock.engine.scheduler import Scheduler


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

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Callable[[], float] = time.monotonic,
        constraints: Constraints | None = None,
    ) -> None:
        """Without `constraints` no request may ask for structured outputs."""
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.steps = 0  # submitted
        self.stalled = False  # the last `step` could neither submit nor read: requests wait for pages of others
        self.rates = RateEstimator()
        self.constraints = constraints
        self._in_flight: deque[_InFlight] = deque()
        self._read_at = float("-inf")
        self._constrained: dict[str, tuple[Request, Constraint]] = {}  # requests whose output has a form

    @property
    def pages(self) -> PageManager:
        return self.scheduler.pages

    def add(
        self, source: GenerateRequest, *, arrived: float | None = None, computed: int = 0, moved_per_token: float = 0.0
    ) -> str:
        """Queue a request and return its key. The key may hold pages already, with the first `computed` tokens in them.

        moved_per_token: as in `Request`.

        Raises:
            ValueError: it exists already, is too long for this engine, or wants an output that this engine cannot give.
        """
        request = Request(source, self.clock() if arrived is None else arrived, moved_per_token=moved_per_token)
        if source.sampling.structured_outputs is not None and self.constraints is None:
            raise ValueError("structured_outputs needs a tokenizer, and this engine has none")
        self.scheduler.add(request, computed=computed)
        constraint = None if self.constraints is None else self.constraints.begin(source)
        if constraint is not None:
            request.constraint = constraint
            self._constrained[request.key] = request, constraint
        return request.key

    def abort(self, request_id: str, choice: int, attempt: int) -> bool:
        """Stop a request; its pages are free as soon as no submitted step writes them. False if it is not here."""
        return self.scheduler.abort(request_key(request_id, choice, attempt)) is not None

    def has_work(self) -> bool:
        """Whether requests are open, or results still have to be read."""
        return bool(self._in_flight) or self.scheduler.has_work()

    def step(self) -> StepOutput:
        """Submit the next step; then, unless the executor is to run further ahead, wait for the oldest one and read it.

        Returns what the step that was read changed, nothing if none was; and the ends of outputs whose form allows
        nothing more.

        Raises:
            Exception: what the executor raised; every step in flight is given up then.
        """
        output = self._advance(wait=True)
        assert output is not None
        return output

    def step_if_done(self) -> StepOutput | None:
        """As `step`, but None where that would wait: until `awaited` is done, or there is more to submit."""
        return self._advance(wait=False)

    @property
    def awaited(self) -> StepHandle:
        """The oldest step in flight, after `step_if_done` gave None."""
        return self._in_flight[0].handle

    def _advance(self, *, wait: bool) -> StepOutput | None:
        try:
            ended: tuple[Output, ...] = ()
            if len(self._in_flight) <= self.executor.run_ahead:
                ended = self._end_complete() if self._constrained else ()
                plan = self.scheduler.plan(self.clock())
                if plan is not None:
                    self._submit(plan)
                self.stalled = not self._in_flight
                if self.stalled or (plan is not None and len(self._in_flight) <= self.executor.run_ahead):
                    return StepOutput(ended)
            if not wait and not self._in_flight[0].handle.done():
                return StepOutput(ended) if ended else None
            output = self._read()
            return StepOutput((*ended, *output.outputs), output.progress) if ended else output
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
        if self.constraints is not None:
            self.constraints.close()

    def _submit(self, plan: StepPlan) -> None:
        submitted, context = self.clock(), self.pages.num_held * self.pages.page_size
        handle = self.executor.submit(plan)
        self._in_flight.append(_InFlight(handle, submitted, plan.num_tokens, len(plan.work), context))
        self.steps += 1

    def _read(self) -> StepOutput:
        step = self._in_flight.popleft()
        result, now = step.handle.result(), self.clock()
        # A step that was submitted behind another one began when that one had ended.
        seconds = now - max(step.submitted, self._read_at)
        self._read_at = now
        self.rates.step(step.num_tokens, step.sequences, step.context_tokens, seconds)
        output = self.scheduler.update(result, now)
        if self.constraints is not None and self._constrained:
            found = [(o, self._constrained[o.key][1]) for o in output.outputs if o.key in self._constrained]
            self.constraints.accept([(constraint, o.token_ids) for o, constraint in found if o.finish is None])
        return output

    def _end_complete(self) -> tuple[Output, ...]:
        """Wait a little for what may follow the last tokens, and end the outputs that nothing follows."""
        assert self.constraints is not None
        unfinished = {key: pair for key, pair in self._constrained.items() if pair[0].status is not Status.FINISHED}
        # Where nothing else could be done meanwhile, slow ones are worth the wait, too.
        idle = self.stalled and not self._in_flight
        self.constraints.wait(c for r, c in unfinished.values() if idle or (not c.slow and r.status is Status.RUNNING))
        ended = []
        for key, (request, constraint) in list(unfinished.items()):
            if request.pending == 0 and constraint.ready and constraint.finish is not None:
                ended.append(self.scheduler.end(request, constraint.finish, self.clock()))
                del unfinished[key]
        self._constrained = unfinished
        return tuple(ended)

    def _give_up(self) -> None:
        self._in_flight.clear()
        self.scheduler.give_up_steps()
