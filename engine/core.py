"""The engine's loop body: plan, run, update. Both workers and the offline `LLM` drive it; none goes around it."""

from __future__ import annotations

import time
from collections.abc import Callable

from penstock.common.messages import GenerateRequest
from penstock.engine.pages import PageManager
from penstock.engine.plan import Executor
from penstock.engine.request import Request, request_key
from penstock.engine.scheduler import Scheduler, StepOutput


class Engine:
    """One scheduler and one executor."""

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Callable[[], float] = time.monotonic) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.steps = 0

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
        """Stop a request and free its pages at once; False if it is not here."""
        return self.scheduler.abort(request_key(request_id, choice, attempt)) is not None

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def step(self) -> StepOutput:
        """Compute one step and return what it changed.

        Raises:
            Exception: what the executor raised; the engine cannot be used afterwards.
        """
        plan = self.scheduler.plan(self.clock())
        if plan is None:
            return StepOutput()
        result = self.executor.submit(plan).result()
        self.steps += 1
        return self.scheduler.update(result, self.clock())

    def close(self) -> None:
        self.executor.close()
