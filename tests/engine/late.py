"""An executor on CPU that is as late as a GPU: a step is computed, its pages written, when its result is read."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from penstock.engine.plan import Executor, StepHandle, StepPlan, StepResult


class Late:
    """Runs `executor` up to `run_ahead` steps behind what was submitted."""

    def __init__(self, executor: Executor, run_ahead: int) -> None:
        self.run_ahead = run_ahead
        self.executor = executor
        self.submitted: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> StepHandle:
        assert len(self.submitted) <= self.run_ahead
        self.submitted.append(plan)
        return _LateStep(self, plan)

    def close(self) -> None:
        self.executor.close()


@dataclass(frozen=True)
class _LateStep:
    late: Late
    plan: StepPlan

    def done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def result(self) -> StepResult:
        assert self.late.submitted.popleft() is self.plan, "results are read in order"
        return self.late.executor.submit(self.plan).result()
