"""`penstock` with workers whose steps take as long as a modelled device's, however fast this machine is.

    PACE='{"step_ms": 20, ...}' python -m benchmarks.paced_worker decode MODEL ...

A worker computes each step on CPU as always: tokens, pages and prefixes are real. Its result is there when the time is
over that the step would have taken, so that several workers on a few cores do not slow each other down; the worker's
loop listens meanwhile, as beside a device. A step that takes longer than that is late, and says so at the end.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from penstock.cli import main
from penstock.engine.core import Engine
from penstock.engine.plan import Executor, StepHandle, StepPlan, StepResult

PACE_ENV = "PACE"
log = logging.getLogger("penstock.paced_worker")


@dataclass(frozen=True)
class Pace:
    """How long a step takes, in milliseconds: so much, and for each token of prompts, sequence and token of context;
    and for each token that a token of a prompt attends to."""

    step_ms: float
    prompt_token_ms: float
    sequence_ms: float
    context_token_ms: float
    attended_ms: float = 0.0

    def slower(self, times: float) -> Pace:
        """So many times as slow."""
        return Pace(**{name: times * value for name, value in asdict(self).items()})

    def seconds(self, plan: StepPlan) -> float:
        tokens, sequences = sum(work.num_tokens for work in plan.work), len(plan.work)
        context = sum(work.start + work.num_tokens for work in plan.work)
        attended = sum(
            work.num_tokens * (work.start + work.num_tokens / 2) for work in plan.work if work.num_tokens > 1
        )
        of_prompts = (tokens - sequences) * self.prompt_token_ms + attended * self.attended_ms
        return (self.step_ms + of_prompts + sequences * self.sequence_ms + context * self.context_token_ms) / 1e3


class _Step:
    """A step that has been computed, but ends at a time of its own."""

    def __init__(self, handle: StepHandle, ends: float) -> None:
        self._handle, self._ends = handle, ends

    def done(self) -> bool:
        return time.monotonic() >= self._ends and self._handle.done()

    def wait(self) -> None:
        time.sleep(max(0.0, self._ends - time.monotonic()))
        self._handle.wait()

    def result(self) -> StepResult:
        self.wait()
        return self._handle.result()


class Paced:
    """Runs `executor` at a pace."""

    run_ahead = 0

    def __init__(self, executor: Executor, pace: Pace) -> None:
        self._executor, self._pace = executor, pace
        self._steps = self._late = 0

    def submit(self, plan: StepPlan) -> StepHandle:
        ends = time.monotonic() + self._pace.seconds(plan)
        handle = self._executor.submit(plan)
        self._steps += 1
        self._late += time.monotonic() > ends
        return _Step(handle, ends)

    def close(self) -> None:
        log.info("%d of %d steps were late", self._late, self._steps)
        self._executor.close()


_init = Engine.__init__


def _init_paced(self: Engine, *args: Any, **options: Any) -> None:
    _init(self, *args, **options)
    self.executor = Paced(self.executor, Pace(**json.loads(os.environ[PACE_ENV])))


if __name__ == "__main__":
    Engine.__init__ = _init_paced  # type: ignore[method-assign]
    raise SystemExit(main())
