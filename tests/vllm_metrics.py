"""What vLLM 0.22.1 serves at /metrics: name, type, labels, upper bounds. From its documentation and source.

Names as a scrape shows them: counters with _total, histograms without _bucket.
"""

from __future__ import annotations

from typing import NamedTuple

TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
READ = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 5)


class Expected(NamedTuple):
    """`labels`: beside model_name and engine, where `own` is False. `values`: what the last label may be."""

    type: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    values: tuple[str, ...] = ()
    own: bool = False


def one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `limit`."""
    found, power = [], 1
    while power <= limit:
        found += [float(power * digit) for digit in (1, 2, 5) if power * digit <= limit]
        power *= 10
    return tuple(found)


def served_always(max_model_len: int) -> dict[str, Expected]:
    """With samples, whatever the options."""
    tokens = one_two_five(max_model_len)
    states = ("awake", "discard_all", "weights_offloaded")
    sources = ("external_kv_transfer", "local_cache_hit", "local_compute")
    return {
        "vllm:num_requests_running": Expected("gauge"),
        "vllm:num_requests_waiting": Expected("gauge"),
        "vllm:num_requests_waiting_by_reason": Expected("gauge", ("reason",), values=("capacity", "deferred")),
        "vllm:kv_cache_usage_perc": Expected("gauge"),
        "vllm:engine_sleep_state": Expected("gauge", ("sleep_state",), values=states),
        "vllm:lora_requests_info": Expected("gauge", ("max_lora", "waiting_lora_adapters", "running_lora_adapters")),
        "vllm:cache_config_info": Expected("gauge", ("block_size", "num_gpu_blocks", "block_bytes")),
        "vllm:prefix_cache_queries_total": Expected("counter"),
        "vllm:prefix_cache_hits_total": Expected("counter"),
        "vllm:external_prefix_cache_queries_total": Expected("counter"),
        "vllm:external_prefix_cache_hits_total": Expected("counter"),
        "vllm:mm_cache_queries_total": Expected("counter"),
        "vllm:mm_cache_hits_total": Expected("counter"),
        "vllm:num_preemptions_total": Expected("counter"),
        "vllm:prompt_tokens_total": Expected("counter"),
        "vllm:prompt_tokens_by_source_total": Expected("counter", ("source",), values=sources),
        "vllm:prompt_tokens_cached_total": Expected("counter"),
        "vllm:generation_tokens_total": Expected("counter"),
        "vllm:request_success_total": Expected(
            "counter", ("finished_reason",), values=("abort", "error", "length", "stop")
        ),
        "vllm:request_prompt_tokens": Expected("histogram", buckets=tokens),
        "vllm:request_generation_tokens": Expected("histogram", buckets=tokens),
        "vllm:request_max_num_generation_tokens": Expected("histogram", buckets=tokens),
        "vllm:request_params_max_tokens": Expected("histogram", buckets=tokens),
        "vllm:request_prefill_kv_computed_tokens": Expected("histogram", buckets=tokens),
        "vllm:request_params_n": Expected("histogram", buckets=(1, 2, 5, 10, 20)),
        "vllm:iteration_tokens_total": Expected("histogram", buckets=(1, *(2**power for power in range(3, 15)))),
        "vllm:time_to_first_token_seconds": Expected("histogram", buckets=TTFT),
        "vllm:inter_token_latency_seconds": Expected("histogram", buckets=TOKEN),
        "vllm:request_time_per_output_token_seconds": Expected("histogram", buckets=TOKEN),
        "vllm:e2e_request_latency_seconds": Expected("histogram", buckets=REQUEST),
        "vllm:request_queue_time_seconds": Expected("histogram", buckets=REQUEST),
        "vllm:request_inference_time_seconds": Expected("histogram", buckets=REQUEST),
        "vllm:request_prefill_time_seconds": Expected("histogram", buckets=REQUEST),
        "vllm:request_decode_time_seconds": Expected("histogram", buckets=REQUEST),
        "vllm:spec_decode_num_drafts_total": Expected("counter"),
        "vllm:spec_decode_num_draft_tokens_total": Expected("counter"),
        "vllm:spec_decode_num_accepted_tokens_total": Expected("counter"),
        "vllm:spec_decode_num_accepted_tokens_per_pos_total": Expected("counter", ("position",)),
        "vllm:nixl_xfer_time_seconds": Expected("histogram", buckets=READ),
        "vllm:nixl_bytes_transferred": Expected("histogram", buckets=tuple(2.0**p for p in range(11, 35, 2))),
        "vllm:nixl_num_descriptors": Expected(
            "histogram", buckets=(10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000)
        ),
        "vllm:nixl_num_failed_transfers_total": Expected("counter"),
        "vllm:nixl_num_failed_notifications_total": Expected("counter"),
        "vllm:nixl_num_kv_expired_reqs_total": Expected("counter"),
        "vllm:kv_offload_total_bytes_total": Expected("counter", ("transfer_type",)),
        "vllm:kv_offload_total_time_total": Expected("counter", ("transfer_type",)),
        "vllm:kv_offload_size": Expected(
            "histogram", ("transfer_type",), (1e6, 5e6, 1e7, 2e7, 4e7, 6e7, 8e7, 1e8, 1.5e8, 2e8)
        ),
        "vllm:websocket_connections_active": Expected("gauge", own=True),
        "vllm:websocket_connections_total": Expected("counter", own=True),
        "vllm:websocket_connection_duration_seconds": Expected(
            "histogram", buckets=(0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800), own=True
        ),
        "http_requests_total": Expected("counter", ("method", "status", "handler"), own=True),
        "http_request_size_bytes": Expected("summary", ("handler",), own=True),
        "http_response_size_bytes": Expected("summary", ("handler",), own=True),
        "http_request_duration_seconds": Expected("histogram", ("method", "handler"), (0.1, 0.5, 1), own=True),
        "http_request_duration_highr_seconds": Expected(
            "histogram",
            buckets=(
                *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5),
                *(7.5, 10, 30, 60),
            ),
            own=True,
        ),
        "process_cpu_seconds_total": Expected("counter", own=True),
        "process_resident_memory_bytes": Expected("gauge", own=True),
        "process_open_fds": Expected("gauge", own=True),
        "python_gc_collections_total": Expected("counter", ("generation",), own=True),
    }


ANNOUNCED = {  # name and type alone: vLLM has samples of these only with its flags, or beside other products' stores
    "vllm:corrupted_requests_total": "counter",
    "vllm:nixl_post_time_seconds": "histogram",
    "vllm:mooncake_store_operation_time_seconds": "histogram",
    "vllm:mooncake_store_operation_total": "counter",
    "vllm:mooncake_store_operation_keys_total": "counter",
    "vllm:mooncake_store_operation_bytes_total": "counter",
    "vllm:mooncake_store_operation_failed_keys_total": "counter",
    "vllm:hf3fs_save_duration_seconds": "histogram",
    "vllm:hf3fs_load_duration_seconds": "histogram",
    "vllm:hf3fs_num_failed_save_total": "counter",
    "vllm:hf3fs_num_failed_load_total": "counter",
}
