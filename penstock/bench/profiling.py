"""Where the time of a run goes: the device's kernels by total time, and the host's part of a step.

The host's part is the wall time of a step less the time in which the host waited for a step's result. It is taken from
a run of its own, since the profiler's cost falls on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity

from penstock.engine.plan import Executor, StepHandle, StepPlan, StepResult
from penstock.llm import LLM

TOP_KERNELS = 25


@dataclass(frozen=True)
class KernelTime:
    """A kernel's launches in a run, added up."""

    name: str
    calls: int
    total_us: float


@dataclass(frozen=True)
class RunProfile:
    """One run; times in microseconds."""

    steps: int
    wall_us: float  # without the profiler
    waited_us: float  # the host for results of steps
    kernels: tuple[KernelTime, ...]  # longest first; CPU operators when there is no GPU
    on_gpu: bool

    @property
    def kernels_us(self) -> float:
        return sum(kernel.total_us for kernel in self.kernels)

    def __str__(self) -> str:
        """The table that people read."""
        steps, total_us = max(self.steps, 1), max(self.kernels_us, 1e-9)
        kind = "kernels" if self.on_gpu else "operators"
        lines = [
            f"{self.steps} steps, {self.wall_us / steps:.1f} us each: {kind} {self.kernels_us / steps:.1f} us, "
            f"host {max(0.0, self.wall_us - self.waited_us) / steps:.1f} us (its wait for results left out)",
            f"{'total ms':>10} {'share':>6} {'calls':>8} {'us/call':>9} {'calls/step':>10}  {kind[:-1]}",
        ]
        for kernel in self.kernels[:TOP_KERNELS]:
            lines.append(
                f"{kernel.total_us / 1e3:>10.3f} {kernel.total_us / total_us:>6.1%} {kernel.calls:>8} "
                f"{kernel.total_us / kernel.calls:>9.2f} {kernel.calls / steps:>10.2f}  {kernel.name[:90]}"
            )
        if len(self.kernels) > TOP_KERNELS:
            rest_us = sum(kernel.total_us for kernel in self.kernels[TOP_KERNELS:])
            lines.append(f"{rest_us / 1e3:>10.3f} {rest_us / total_us:>6.1%}  {len(self.kernels) - TOP_KERNELS} others")
        return "\n".join(lines)


class _Waiting:
    """An executor that notes how long `result` takes."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.run_ahead = executor.run_ahead
        self.steps = 0
        self.waited_s = 0.0

    def submit(self, plan: StepPlan) -> StepHandle:
        self.steps += 1
        return _WaitingHandle(self._executor.submit(plan), self)

    def close(self) -> None:
        self._executor.close()


@dataclass(frozen=True)
class _WaitingHandle:
    handle: StepHandle
    owner: _Waiting

    def done(self) -> bool:
        return self.handle.done()

    def wait(self) -> None:
        self.handle.wait()

    def result(self) -> StepResult:
        begun = time.perf_counter()
        found = self.handle.result()
        self.owner.waited_s += time.perf_counter() - begun
        return found


def profile(llm: LLM, run: Callable[[], object]) -> RunProfile:
    """Run twice: timed, then under torch's profiler. The run should be warm."""
    engine = llm.engine
    executor = engine.executor
    waiting = _Waiting(executor)
    engine.executor = waiting
    begun = time.perf_counter()
    try:
        run()
    finally:
        engine.executor = executor
    wall_us = (time.perf_counter() - begun) * 1e6
    on_gpu = llm.on_gpu
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as recorded:
        run()
    kernels = []
    for event in recorded.key_averages():
        if (event.device_type.name == "CUDA") == on_gpu:
            time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if time_us > 0:
                kernels.append(KernelTime(event.key, event.count, time_us))
    ordered = tuple(sorted(kernels, key=lambda kernel: -kernel.total_us))
    return RunProfile(waiting.steps, wall_us, waiting.waited_s * 1e6, ordered, on_gpu)
