"""How a worker's load looks to Prometheus: the one mapping from `WorkerLoad` to metric families.

Used by a worker's own /metrics (status_server.py) and by the router's, which shows every worker it is linked to.
Where a figure means the same as one of vLLM's it carries vLLM's name, so that existing dashboards work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from penstock.common.messages import MeasuredRates, WorkerLoad

LABELS = ("model_name", "engine")  # engine: the worker id

_Read = Callable[[WorkerLoad], float]


def kv_cache_usage(load: WorkerLoad) -> float:
    """Share of the KV pages that somebody holds, 0 to 1; cached prefixes that nobody holds count as free."""
    return 1.0 - load.free_pages / load.num_pages if load.num_pages else 0.0


def _rate(name: str) -> _Read:
    return lambda load: float(getattr(load.rates, name))


_RATES = {
    "prefill_tokens_per_s": "Prompt tokens that the worker computes a second, as measured; 0: not yet.",
    "prefill_step_ms": "Milliseconds of a step with prompts, beside their tokens.",
    "decode_step_ms": "Milliseconds of a decode step, beside its sequences.",
    "decode_sequence_ms": "Milliseconds that a sequence adds to a step.",
    "decode_context_ms": "Milliseconds that a token of context adds to a step.",
    "link_bytes_per_s": "Bytes of pages that the worker reads from others a second.",
    "link_setup_ms": "Milliseconds of such a read, beside its bytes.",
}
_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("vllm:num_requests_running", "Requests in the running batch.", lambda load: load.running),
    ("vllm:num_requests_waiting", "Requests that wait for room or for their turn.", lambda load: load.waiting),
    ("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", kv_cache_usage),
    ("penstock:queued_tokens", "Prompt tokens that are still to be computed.", lambda load: load.queued_tokens),
    ("penstock:kv_pages", "KV pages of the pool.", lambda load: load.num_pages),
    ("penstock:kv_pages_free", "KV pages held by nobody, cached prefixes included.", lambda load: load.free_pages),
    ("penstock:kv_pages_lent", "KV pages offered to decode workers.", lambda load: load.lent_pages),
    (
        "penstock:kv_pages_quarantined",
        "KV pages that an unsettled transfer may still write.",
        lambda load: load.quarantined_pages,
    ),
    *(
        (f"penstock:measured_{field.name}", _RATES[field.name], _rate(field.name))
        for field in msgspec.structs.fields(MeasuredRates)
    ),
    ("penstock:draining", "1 while the worker finishes what it has and takes nothing new.", lambda load: load.draining),
)
_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("vllm:prompt_tokens", "Prompt tokens processed.", lambda load: load.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated.", lambda load: load.generation_tokens),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda load: load.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda load: load.prefix_hits),
    ("vllm:num_preemptions", "Requests preempted because pages ran out.", lambda load: load.preemptions),
    ("penstock:engine_steps", "Steps of the engine.", lambda load: load.steps),
    ("penstock:handoffs", "Prompts handed from a prefill to a decode worker.", lambda load: load.handoffs),
    (
        "penstock:handoff_failures",
        "Hand-offs given up; the rest of the prompt was computed locally.",
        lambda load: load.handoff_failures,
    ),
    ("penstock:kv_transfer_bytes", "Bytes of KV moved between workers.", lambda load: load.transfer_bytes),
    ("penstock:kv_transfer_pages", "KV pages moved between workers.", lambda load: load.transfer_pages),
    ("penstock:kv_checksum_failures", "Moved pages whose checksum differed.", lambda load: load.checksum_failures),
)


def worker_metric_families(model_name: str, rows: Iterable[tuple[str, WorkerLoad]]) -> list[Metric]:
    """Metric families with one sample a worker.

    Args:
        model_name: the label `model_name`: the first served model name.
        rows: (worker id, load) of every worker to show.
    """
    rows = list(rows)
    families: list[Metric] = []
    for name, help_text, read in _GAUGES:
        gauge = GaugeMetricFamily(name, help_text, labels=LABELS)
        for worker_id, load in rows:
            gauge.add_metric((model_name, worker_id), read(load))
        families.append(gauge)
    for name, help_text, read in _COUNTERS:
        counter = CounterMetricFamily(name, help_text, labels=LABELS)
        for worker_id, load in rows:
            counter.add_metric((model_name, worker_id), read(load))
        families.append(counter)
    return families
