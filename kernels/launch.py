"""What the Triton kernels share: where they run, and launching one before the kernel ahead of it has ended.

An op dispatches with `use_triton(x)`: Triton on CUDA, its plain PyTorch reference elsewhere. Under TRITON_INTERPRET=1
(tests on CPU) a `*_triton` launcher also takes CPU tensors; `interpret_ops` makes the ops themselves choose them.

Programmatic dependent launch (CUDA C++ Programming Guide): a kernel started with `**pdl_options(x)` may begin while its
predecessor still runs. The rule for every such kernel, with `PDL: tl.constexpr`: before its `gdc_wait` it reads weights
and what is as old as the step, nothing that an earlier kernel of the layer writes, and writes nothing. After the wait
everything before it is complete, its predecessors' predecessors included.

As old as the step is what it wrote at its beginning: lengths, page tables, slots, rotary factors, attention's plan. A
kernel starts when the one ahead lets it: products (small_linear.py, row_linear.py) do so at once, so that several in a
row have their weights under way, all others after their own wait, when all before them is complete. The embedding is
such a one and comes last of the step's beginning: whatever starts after it finds the rest of the beginning complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
interpret_ops = False
"""Tests set this to run whole models through Triton's interpreter on CPU."""


def use_triton(x: Tensor) -> bool:
    """Whether ops on x go through their Triton kernels."""
    return x.is_cuda or (interpret_ops and INTERPRETED)


def pdl_options(x: Tensor) -> dict[str, Any]:
    """Keyword arguments of a launch: `PDL` for the kernel, `launch_pdl` for the driver where the card can do it."""
    if x.is_cuda and _capability(x.device)[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


_COMPILING = threading.Lock()  # one at a time in a process
_LAUNCH = triton.JITFunction.run


@contextmanager
def compiling(threads: int, progress: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """While this is in force this thread launches nothing: kernels are compiled for what they are called with, several
    at once. Other threads, of another engine say, go on as ever; who compiles, too, waits. Not to be nested.

    `progress` gets (done, in all) when the calls are over. Raises what the compiler raises, on leaving.
    """
    owner = threading.get_ident()

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        return _LAUNCH(kernel, *arguments, grid=grid, warmup=warmup or threading.get_ident() == owner, **named)

    with _COMPILING, ThreadPoolExecutor(threads) as executor:
        # The first error is raised here and not by the mode, which would then stay in force for good.
        with triton.AsyncCompileMode(executor, ignore_errors=True) as mode:
            triton.JITFunction.run = compile_only  # every kernel[grid](...) ends there, whatever op calls it
            try:
                yield
            finally:
                triton.JITFunction.run = _LAUNCH
            for done, _ in enumerate(as_completed(mode.raw_futures), 1):
                if progress is not None:
                    progress(done, len(mode.raw_futures))
        for future in mode.raw_futures:
            future.result()


def num_multiprocessors(device: torch.device) -> int:
    """Of a device; a small number for the interpreter."""
    return _multiprocessors(device) if device.type == "cuda" else 4


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
