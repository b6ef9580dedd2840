"""Compiles the kernels of all common steps before the first one runs, many at a time.

Left to the steps themselves, Triton's compiler would run one kernel after the other: half a minute on an H200's host
for llama8b. So all steps are gone through once without launching anything, with one layer of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from penstock.common.cores import available_cores
from penstock.engine.device_runner import DeviceRunner
from penstock.engine.kv_pool import KVLayout, KVPool
from penstock.engine.memory import Limits, largest_step, no_room
from penstock.kernels.launch import compiling
from penstock.models.decoder import CausalLM


def compile_steps(
    model: CausalLM,
    layout: KVLayout,
    limits: Limits,
    device: torch.device,
    *,
    largest_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compile what a runner of these limits launches. `progress` gets (done, in all) kernels.

    largest_only: leaves out the steps that are captured as graphs, where none will be.

    Raises:
        ConfigError: the largest step finds no room. What Triton's compiler raises, as it is.
    """
    few = model.one_of_each_layer()
    pages = -(-limits.max_num_batched_tokens // layout.page_size) + limits.max_num_seqs
    try:
        pool = KVPool(replace(layout, num_layers=few.spec.num_layers), pages, device)
        runner = DeviceRunner(few, pool, **asdict(limits))
        try:
            with compiling(available_cores(), progress):
                if not largest_only:
                    runner.run_empty()
                runner.submit(largest_step(limits, layout.page_size)).result()
        finally:
            runner.close()
    except torch.OutOfMemoryError as error:
        raise no_room(device) from error
