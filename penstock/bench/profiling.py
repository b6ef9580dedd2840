"""Where the time of a run goes: the device's kernels by total time, and the host's part of a step.

The host's part is the wall time of a step less the time in which the host waited for the device, both without the
profiler's own cost where that is known: the run is timed once before it is profiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity

from penstock.llm import LLM

TOP_KERNELS = 25
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


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
    waited_us: float  # the host in calls that wait for the device
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
            f"host {max(0.0, self.wall_us - self.waited_us) / steps:.1f} us (its wait for the device left out)",
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


def profile(llm: LLM, run: Callable[[], object]) -> RunProfile:
    """Run twice: timed, then under torch's profiler. The run should be warm."""
    on_gpu = torch.cuda.is_available()
    begun, steps = time.perf_counter(), llm.num_steps
    run()
    wall_us = (time.perf_counter() - begun) * 1e6
    steps = llm.num_steps - steps
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as recorded:
        run()
    kernels: dict[str, KernelTime] = {}
    waited_us = 0.0
    for event in recorded.key_averages():
        if event.key in _WAITS:
            waited_us += event.self_cpu_time_total
        if (event.device_type.name == "CUDA") == on_gpu:
            time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if time_us > 0:
                kernels[event.key] = KernelTime(event.key, event.count, time_us)
    ordered = tuple(sorted(kernels.values(), key=lambda kernel: -kernel.total_us))
    return RunProfile(steps, wall_us, waited_us, ordered, on_gpu)
