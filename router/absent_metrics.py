"""vLLM's metrics of features that Penstock has not: nothing of the kind has happened, and that is what they say.

A dashboard that asks for one shows 0, not an error. What vLLM counts at other products' stores, or only by request, is
announced (name, type) without a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

_NONE: tuple[dict[str, str], ...] = ({},)
_TRANSFERS = ({"transfer_type": "cpu_to_gpu"}, {"transfer_type": "gpu_to_cpu"})
_COUNTERS: dict[str, tuple[str, tuple[dict[str, str], ...]]] = {
    "vllm:mm_cache_queries": ("Images and audio looked up: there are none.", _NONE),
    "vllm:mm_cache_hits": ("Images and audio found: there are none.", _NONE),
    "vllm:spec_decode_num_drafts": ("Speculative decoding: none.", _NONE),
    "vllm:spec_decode_num_draft_tokens": ("Speculative decoding: none.", _NONE),
    "vllm:spec_decode_num_accepted_tokens": ("Speculative decoding: none.", _NONE),
    "vllm:spec_decode_num_accepted_tokens_per_pos": ("Speculative decoding: none.", ({"position": "0"},)),
    "vllm:nixl_num_failed_notifications": ("Pages are pulled: nobody is notified.", _NONE),
    "vllm:kv_offload_total_bytes": ("KV pages moved to or from host memory: none.", _TRANSFERS),
    "vllm:kv_offload_total_time": ("KV pages moved to or from host memory: none.", _TRANSFERS),
    "vllm:corrupted_requests": ("Logits are not searched for NaN.", ()),
    "vllm:mooncake_store_operation": ("No Mooncake store.", ()),
    "vllm:mooncake_store_operation_keys": ("No Mooncake store.", ()),
    "vllm:mooncake_store_operation_bytes": ("No Mooncake store.", ()),
    "vllm:mooncake_store_operation_failed_keys": ("No Mooncake store.", ()),
    "vllm:hf3fs_num_failed_save": ("No 3FS store.", ()),
    "vllm:hf3fs_num_failed_load": ("No 3FS store.", ()),
}
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...], tuple[dict[str, str], ...]]] = {
    "vllm:nixl_post_time_seconds": (
        "Posting a read is part of vllm:nixl_xfer_time_seconds.",
        (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0),
        (),
    ),
    "vllm:kv_offload_size": (
        "KV pages moved to or from host memory: none.",
        (1e6, 5e6, 10e6, 20e6, 40e6, 60e6, 80e6, 100e6, 150e6, 200e6),
        _TRANSFERS,
    ),
    "vllm:mooncake_store_operation_time_seconds": ("No Mooncake store.", (), ()),
    "vllm:hf3fs_save_duration_seconds": ("No 3FS store.", (), ()),
    "vllm:hf3fs_load_duration_seconds": ("No 3FS store.", (), ()),
}


def absent_families(labels: Mapping[str, str]) -> Iterator[Metric]:
    """The families, with samples for one engine."""
    names = list(labels)
    for name, (help, variants) in _COUNTERS.items():
        family = CounterMetricFamily(name, help, labels=[*names, *(variants[0] if variants else ())])
        for variant in variants:
            family.add_metric([*labels.values(), *variant.values()], 0)
        yield family
    for name, (help, bounds, variants) in _HISTOGRAMS.items():
        buckets = [(str(bound), 0.0) for bound in (*map(float, bounds), "+Inf")]
        histogram = HistogramMetricFamily(name, help, labels=[*names, *(variants[0] if variants else ())])
        for variant in variants:
            histogram.add_metric([*labels.values(), *variant.values()], buckets, 0.0)
        yield histogram
    adapters = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
    lora = GaugeMetricFamily("vllm:lora_requests_info", "There are no adapters.", labels=[*names, *adapters])
    lora.add_metric([*labels.values(), "0", "", ""], 0)
    yield lora
    yield GaugeMetricFamily("vllm:websocket_connections_active", "There is no WebSocket route.", value=0)
    yield CounterMetricFamily("vllm:websocket_connections", "There is no WebSocket route.", value=0)
    closed = [
        (str(bound), 0.0) for bound in (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, "+Inf")
    ]
    yield HistogramMetricFamily(
        "vllm:websocket_connection_duration_seconds", "There is no WebSocket route.", closed, 0.0
    )
