"""How large the KV pool may be: stated, or measured on a GPU by running the largest step once."""

from __future__ import annotations

import torch

from penstock.common.config import EngineConfig
from penstock.common.errors import ConfigError
from penstock.engine.kv_pool import KVLayout, KVPool
from penstock.kernels.paged_batch import PagedBatch
from penstock.models.decoder import CausalLM

CPU_DEFAULT_BYTES = 2**30


def pool_size_bytes(
    config: EngineConfig, model: CausalLM, layout: KVLayout, device: torch.device, memory_share: float
) -> int:
    """Bytes for the pool.

    Raises:
        ConfigError: nothing is left for it.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cpu":
        return CPU_DEFAULT_BYTES
    return _measured(config, model, layout, device, memory_share)


@torch.inference_mode()
def _measured(
    config: EngineConfig, model: CausalLM, layout: KVLayout, device: torch.device, memory_share: float
) -> int:
    """The device's budget, less weights and the peak of the largest step."""
    num_tokens = config.max_num_batched_tokens
    num_seqs = min(config.max_num_seqs, num_tokens)
    pages = -(-num_tokens // layout.page_size)
    scratch = KVPool(layout, pages, device)
    torch.cuda.reset_peak_memory_stats(device)
    batch = PagedBatch.build([num_tokens], [num_tokens], [list(range(pages))], layout.page_size, device)
    hidden = model.forward(torch.zeros(num_tokens, dtype=torch.int64, device=device), batch, scratch.layers())
    logits = model.logits(hidden[:num_seqs])
    logits.softmax(dim=-1).sort(dim=-1)
    torch.cuda.synchronize(device)
    peak_bytes = torch.cuda.max_memory_allocated(device) - scratch.pages.nbytes
    total_bytes = torch.cuda.mem_get_info(device)[1]
    del scratch, batch, hidden, logits
    torch.cuda.empty_cache()
    room = int(total_bytes * config.gpu_memory_utilization * memory_share) - peak_bytes
    if room < layout.page_bytes:
        raise ConfigError(
            f"no memory is left for KV pages: budget {total_bytes * config.gpu_memory_utilization * memory_share:.3g} "
            f"bytes, weights and activations {peak_bytes:.3g}; raise gpu_memory_utilization or use fewer workers here"
        )
    return room
