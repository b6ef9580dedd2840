"""How a worker looks to Prometheus: the one mapping from `WorkerInfo` and `WorkerLoad` to metric families.

Used by a worker's own /metrics (status_server.py) and by the router's, which shows every worker it is linked to.
Where a figure means the same as one of vLLM's it carries vLLM's name, so that existing dashboards work. Over a fleet
that hands prompts off each prompt token counts once in `vllm:prompt_tokens`: where it was computed or found cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import msgspec
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from penstock.common.histogram import READ_BYTES, READ_PAGES, READ_SECONDS, STEP_TOKENS, Histogram
from penstock.common.messages import MeasuredRates, WorkerInfo, WorkerLoad

LABELS = ("model_name", "engine")  # engine: the worker id

_Row = tuple[WorkerInfo, WorkerLoad]
_Read = Callable[[WorkerLoad], float]


def kv_cache_usage(load: WorkerLoad) -> float:
    """Share of the KV pages that somebody holds, 0 to 1; cached prefixes that nobody holds count as free."""
    return 1.0 - load.free_pages / load.num_pages if load.num_pages else 0.0


def _rate(name: str) -> _Read:
    return lambda load: float(getattr(load.rates, name))


def _peers(transport: str) -> _Read:
    return lambda load: list(load.transports.values()).count(transport)


_RATES = {
    "prefill_tokens_per_s": "Prompt tokens that the worker computes a second, as measured; 0: not yet.",
    "prefill_step_ms": "Milliseconds of a step with prompts, beside their tokens.",
    "decode_step_ms": "Milliseconds of a decode step, beside its sequences.",
    "decode_sequence_ms": "Milliseconds that a sequence adds to a step.",
    "decode_context_ms": "Milliseconds that a token of context adds to a step.",
    "link_bytes_per_s": "Bytes of pages that the worker reads from others a second.",
    "link_setup_ms": "Milliseconds of such a read, beside its bytes.",
}


@dataclass(frozen=True)
class _Figure:
    """A gauge or counter: one sample a worker, or one for each value of `label`."""

    name: str
    help: str
    read: _Read | dict[str, _Read]
    label: str = ""

    def fill(self, family: GaugeMetricFamily | CounterMetricFamily, model_name: str, rows: Sequence[_Row]) -> Metric:
        for info, load in rows:
            if isinstance(self.read, dict):
                for value, read in self.read.items():
                    family.add_metric((model_name, info.worker_id, value), read(load))
            else:
                family.add_metric((model_name, info.worker_id), self.read(load))
        return family

    @property
    def labels(self) -> Sequence[str]:
        return (*LABELS, self.label) if self.label else LABELS


_GAUGES = (
    _Figure("vllm:num_requests_running", "Requests in the running batch.", lambda load: load.running),
    _Figure("vllm:num_requests_waiting", "Requests that wait for room or for their turn.", lambda load: load.waiting),
    _Figure(
        "vllm:num_requests_waiting_by_reason",
        "Of those that wait: for room or their turn (capacity), for pages from a prefill worker (deferred).",
        {"capacity": lambda load: load.waiting - load.deferred, "deferred": lambda load: load.deferred},
        "reason",
    ),
    _Figure(
        "penstock:requests_held_up",
        "Of those that wait, those for which there was no room when it was their turn.",
        lambda load: load.held_up,
    ),
    _Figure("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", kv_cache_usage),
    _Figure(
        "vllm:engine_sleep_state",
        "A worker never sleeps: it is always awake.",
        {"awake": lambda _: 1, "weights_offloaded": lambda _: 0, "discard_all": lambda _: 0},
        "sleep_state",
    ),
    _Figure("penstock:queued_tokens", "Prompt tokens that are still to be computed.", lambda load: load.queued_tokens),
    _Figure("penstock:kv_pages", "KV pages of the pool.", lambda load: load.num_pages),
    _Figure(
        "penstock:kv_pages_free", "KV pages held by nobody, cached prefixes included.", lambda load: load.free_pages
    ),
    _Figure(
        "penstock:kv_pages_promised",
        "Free KV pages that are promised to admitted requests.",
        lambda load: load.promised_pages,
    ),
    _Figure("penstock:kv_pages_lent", "KV pages offered to decode workers.", lambda load: load.lent_pages),
    _Figure(
        "penstock:kv_pages_quarantined",
        "KV pages that an unsettled transfer may still write.",
        lambda load: load.quarantined_pages,
    ),
    _Figure(
        "penstock:kv_pages_forgotten",
        "KV pages held for nobody that the worker knows: more than none is a leak.",
        lambda load: load.forgotten_pages,
    ),
    *(
        _Figure(f"penstock:measured_{field.name}", _RATES[field.name], _rate(field.name))
        for field in msgspec.structs.fields(MeasuredRates)
    ),
    _Figure(
        "penstock:kv_transport_peers",
        "Workers whose pages are read over each transport.",
        {name: _peers(name) for name in ("cuda_ipc", "shm", "nixl", "tcp")},
        "transport",
    ),
    _Figure(
        "penstock:draining",
        "1 while the worker finishes what it has and takes nothing new.",
        lambda load: load.draining,
    ),
    _Figure("penstock:registered", "1 while Redis has the worker's lease and pages.", lambda load: load.registered),
    _Figure("penstock:index_pages", "Pages announced to the prefix index.", lambda load: load.index_pages),
    _Figure(
        "penstock:index_pending", "Changes that the prefix index has not got yet.", lambda load: load.index_pending
    ),
)
_COUNTERS = (
    _Figure(
        "vllm:prompt_tokens",
        "Tokens of the prompts computed here, those found in the prefix cache included.",
        lambda load: load.prompt_tokens + load.cached_tokens,
    ),
    _Figure(
        "vllm:prompt_tokens_by_source",
        "Prompt tokens computed, found in the prefix cache, or received from a prefill worker, which counts them too.",
        {
            "local_compute": lambda load: load.prompt_tokens,
            "local_cache_hit": lambda load: load.cached_tokens,
            "external_kv_transfer": lambda load: load.received_tokens,
        },
        "source",
    ),
    _Figure(
        "vllm:prompt_tokens_cached",
        "Prompt tokens that were not computed here: found in the prefix cache, or received.",
        lambda load: load.cached_tokens + load.received_tokens,
    ),
    _Figure("vllm:generation_tokens", "Tokens generated.", lambda load: load.generation_tokens),
    _Figure(
        "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda load: load.prefix_queries
    ),
    _Figure("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda load: load.prefix_hits),
    _Figure(
        "vllm:external_prefix_cache_queries",
        "Prompt tokens asked of a prefill worker.",
        lambda load: load.asked_tokens,
    ),
    _Figure(
        "vllm:external_prefix_cache_hits",
        "Prompt tokens whose pages came from a prefill worker.",
        lambda load: load.received_tokens,
    ),
    _Figure("vllm:num_preemptions", "Requests preempted because pages ran out.", lambda load: load.preemptions),
    _Figure(
        "vllm:nixl_num_failed_transfers",
        "Hand-offs given up, over whatever transport.",
        lambda load: load.handoff_failures,
    ),
    _Figure(
        "vllm:nixl_num_kv_expired_reqs",
        "Prompts whose lent pages were taken back, as their reader was gone, or silent for a lease.",
        lambda load: load.expired_loans,
    ),
    _Figure(
        "penstock:index_losses",
        "Times that the prefix index had lost all pages of the worker and got them again.",
        lambda load: load.index_losses,
    ),
    _Figure(
        "penstock:index_repaired_pages",
        "Pages that the prefix index had lost one by one and got again.",
        lambda load: load.index_repaired,
    ),
    _Figure("penstock:engine_steps", "Steps of the engine.", lambda load: load.steps),
    _Figure("penstock:handoffs", "Prompts handed from a prefill to a decode worker.", lambda load: load.handoffs),
    _Figure(
        "penstock:handoff_failures",
        "Hand-offs given up; the rest of the prompt was computed locally.",
        lambda load: load.handoff_failures,
    ),
    _Figure("penstock:kv_transfer_bytes", "Bytes of KV moved between workers.", lambda load: load.transfer_bytes),
    _Figure("penstock:kv_transfer_pages", "KV pages moved between workers.", lambda load: load.transfer_pages),
    _Figure(
        "penstock:moved_requests", "Requests given up to other workers, with their pages.", lambda load: load.moved
    ),
    _Figure("penstock:fetches", "Prefixes asked of other workers rather than computed.", lambda load: load.fetches),
    _Figure(
        "penstock:fetch_failures",
        "Fetches given up; the rest of the prefix was computed.",
        lambda load: load.fetch_failures,
    ),
    _Figure(
        "penstock:fetched_tokens",
        "Prompt tokens whose pages came from other workers.",
        lambda load: load.fetched_tokens,
    ),
    _Figure(
        "penstock:kv_checksum_failures", "Moved pages whose checksum differed.", lambda load: load.checksum_failures
    ),
)
# Metric, help, name in WorkerLoad.histograms, upper bounds.
_HISTOGRAMS: tuple[tuple[str, str, str, Sequence[float]], ...] = (
    ("vllm:iteration_tokens_total", "Prompt and output tokens of an engine step.", "step_tokens", STEP_TOKENS),
    ("vllm:nixl_xfer_time_seconds", "Reading a ticket's pages, over whatever transport.", "read_s", READ_SECONDS),
    ("vllm:nixl_bytes_transferred", "Bytes of a ticket's pages.", "read_bytes", READ_BYTES),
    ("vllm:nixl_num_descriptors", "Pages of a ticket; each is moved as one piece.", "read_pages", READ_PAGES),
)


def worker_metric_families(model_name: str, rows: Iterable[_Row]) -> list[Metric]:
    """Metric families with one sample a worker.

    Args:
        model_name: the label `model_name`: the first served model name.
        rows: every worker to show, with what it said last of itself.
    """
    rows = list(rows)
    families: list[Metric] = [
        figure.fill(GaugeMetricFamily(figure.name, figure.help, labels=figure.labels), model_name, rows)
        for figure in _GAUGES
    ]
    families += [
        figure.fill(CounterMetricFamily(figure.name, figure.help, labels=figure.labels), model_name, rows)
        for figure in _COUNTERS
    ]
    for name, help, key, bounds in _HISTOGRAMS:
        histograms = [
            (
                {"model_name": model_name, "engine": info.worker_id},
                Histogram.unpacked(bounds, load.histograms.get(key, ())),
            )
            for info, load in rows
        ]
        families.append(histogram_family(name, help, histograms, LABELS))
    cache = GaugeMetricFamily(
        "vllm:cache_config_info", "The KV pool.", labels=(*LABELS, "block_size", "num_gpu_blocks", "block_bytes")
    )
    for info, _ in rows:
        sizes = (str(info.page_size), str(info.num_pages), str(info.page_bytes))
        cache.add_metric((model_name, info.worker_id, *sizes), 1)
    return [*families, cache]


def histogram_family(
    name: str,
    help: str,
    rows: Iterable[tuple[Mapping[str, str], Histogram]],
    labels: Sequence[str],
    shown: Iterable[float] | None = None,
) -> HistogramMetricFamily:
    """The metric family of one histogram, a row per set of label values.

    Args:
        shown: the upper bounds to show, of those that are counted; default: all.
    """
    family = HistogramMetricFamily(name, help, labels=labels)
    bounds = None if shown is None else frozenset(shown)
    for values, histogram in rows:
        cumulative = list(accumulate(histogram.counts))
        buckets = [
            (str(float(bound)), float(count))
            for bound, count in zip(histogram.bounds, cumulative, strict=False)
            if bounds is None or bound in bounds
        ]
        buckets.append(("+Inf", float(cumulative[-1])))
        family.add_metric([values[label] for label in labels], buckets, histogram.total)
    return family
