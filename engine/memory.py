"""How large the KV pool may be: stated, or measured on a GPU: the largest step is run and every graph captured once."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from penstock.common.config import EngineConfig
from penstock.common.errors import ConfigError
from penstock.common.sampling import SamplingParams
from penstock.engine.device_runner import DeviceRunner
from penstock.engine.kv_pool import KVLayout, KVPool
from penstock.engine.plan import SequenceStart, SequenceWork, StepPlan
from penstock.models.decoder import CausalLM

CPU_DEFAULT_BYTES = 2**30
_OTHERS_BYTES = 2**30  # a CUDA context and its libraries, where several workers share a device
_MOST_LOGPROBS = 20  # of a token, through the API
_SLACK_BYTES = 256 * 2**20  # the allocator's blocks do not fit as closely in every order of steps


@dataclass(frozen=True)
class Limits:
    """What the options promise: a step never holds more."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    mixed_chunk_tokens: int = 0  # of prompts, in a step that also decodes few; 0: as many as in any other
    prompt_step_tokens: int = 0  # in a full step that decodes nothing; 0: as many as in any other


def pool_size_bytes(
    config: EngineConfig,
    model: CausalLM,
    layout: KVLayout,
    limits: Limits,
    device: torch.device,
    memory_share: float,
) -> int:
    """Bytes for the pool.

    Raises:
        ConfigError: nothing is left for it, or not even the largest step fits.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cpu":
        return CPU_DEFAULT_BYTES
    budget = int(torch.cuda.mem_get_info(device)[1] * config.gpu_memory_utilization * memory_share)
    try:
        needed = _measure(config, model, layout, limits, device, alone=memory_share == 1.0)
    except torch.OutOfMemoryError as error:
        raise no_room(device) from error
    if budget - needed < layout.page_bytes:
        raise ConfigError(
            f"no memory is left for KV pages: the budget is {budget / 2**30:.1f} GiB, weights and the largest step "
            f"take {needed / 2**30:.1f} GiB; raise gpu_memory_utilization or lower max_num_batched_tokens"
        )
    return budget - needed


def no_room(device: torch.device) -> ConfigError:
    """For a step that ran out of memory before there was a pool."""
    return ConfigError(
        f"{device} has no room for weights and the largest step: lower max_num_batched_tokens or max_num_seqs"
    )


def _measure(
    config: EngineConfig, model: CausalLM, layout: KVLayout, limits: Limits, device: torch.device, *, alone: bool
) -> int:
    """Bytes that everything but the pool takes at its largest.

    alone: whatever else is on the device (other processes too) counts; else only what torch allocated here, and a
    reserve for the rest.
    """
    torch.cuda.empty_cache()  # what loading the weights left behind
    scratch = KVPool(layout, -(-limits.max_num_batched_tokens // layout.page_size) + limits.max_num_seqs, device)
    torch.cuda.reset_peak_memory_stats(device)
    runner = DeviceRunner(model, scratch, **asdict(limits))
    runner.submit(largest_step(limits, layout.page_size)).result()
    if not config.enforce_eager:
        runner.capture()
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    peak = torch.cuda.max_memory_reserved(device) - scratch.pages.nbytes
    runner.close()
    del runner, scratch
    torch.cuda.empty_cache()
    return peak + (others if alone else min(others, _OTHERS_BYTES)) + _SLACK_BYTES


def largest_step(limits: Limits, page_size: int) -> StepPlan:
    """As many tokens and sampled sequences as a step may have; one chunk stands at the end of the longest context."""
    others = min(limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len) - 1
    chunk = min(limits.max_num_batched_tokens - others, limits.max_model_len - 1)
    greedy = SamplingParams(temperature=0.0, logprobs=_MOST_LOGPROBS)
    started, work = [], []
    for i in range(others):
        started.append(SequenceStart(str(i), (0,), 1, greedy, 0, ()))
        work.append(SequenceWork(str(i), 0, 1, (0,), True))
    long = limits.max_model_len - 1
    pages = -(-long // page_size)
    started.append(SequenceStart("long", (0,) * long, long, greedy, 0, ()))
    work.append(SequenceWork("long", long - chunk, chunk, (0,) * pages, True))
    return StepPlan(0, (), tuple(started), tuple(work))
