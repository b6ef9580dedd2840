"""Writes dashboards/penstock.json, which Grafana shows, from the rows below: python compose/grafana/make_dashboard.py

A panel is a title, a unit of Grafana's, and queries with their legends. `{m}` stands for the choice of a model. A test
asks a Prometheus that watches a live fleet every query, and compares the file with what this program would write.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parent / "dashboards" / "penstock.json"
M = 'model_name=~"$model_name"'
WIDTH, HEIGHT, PER_ROW = 24, 8, 3

Query = tuple[str, str]  # PromQL, legend
Rate = Callable[[str, str], str]  # a counter and the labels to keep, to PromQL


def rate(metric: str, by: str = "", more: str = "") -> str:
    """What a counter of the routers grows by a second, summed: each counts its own requests."""
    labels = f"{M},{more}" if more else M
    return f"sum{_by(by)} (rate({metric}{{{labels}}}[$__rate_interval]))"


def worker_rate(metric: str, by: str = "") -> str:
    """What a counter of the workers grows by a second, summed."""
    return _summed(f"rate({metric}{{{M}}}[$__rate_interval])", by)


def percentiles(metric: str, rate: Rate = rate) -> list[Query]:
    """Percentiles and mean of a histogram."""
    found = [
        (f"histogram_quantile({part}, {rate(metric + '_bucket', 'le')})", f"p{round(part * 100)}")
        for part in (0.5, 0.9, 0.99)
    ]
    return [*found, (f"{rate(metric + '_sum', '')} / {rate(metric + '_count', '')}", "mean")]


def worker_level(metric: str, by: str = "") -> str:
    """A gauge of the workers as it stands, summed."""
    return _summed(f"{metric}{{{M}}}", by)


def level(metric: str, how: str = "sum") -> str:
    """A gauge of the routers as it stands; of what they say of the same thing, a minimum is the worst."""
    return f"{how} ({metric}{{{M}}})"


def _summed(of_workers: str, by: str) -> str:
    """Every router repeats every worker's figures: each worker's is taken once."""
    one = ", ".join(sorted({"engine", "model_name", *by.split(", ")} - {""}))
    return f"sum{_by(by)} (max by ({one}) ({of_workers}))"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def turned_away(code: str) -> str:
    """Requests refused with an error code; 0 as long as there was none."""
    return rate("penstock:request_errors_total", more=f'code="{code}"') + " or vector(0)"


REQUESTS = "sum by (handler, status) (rate(http_requests_total[$__rate_interval]))"
PROCESSOR = 'rate(process_cpu_seconds_total{job="penstock"}[$__rate_interval])'
ENGINE = "{{engine}}"
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
LOST = f"max (rate(penstock:workers_lost_total{{{M}}}[$__rate_interval]))"  # every router counts the same loss

ROWS: dict[str, list[tuple[str, str, list[Query]]]] = {
    "Traffic": [
        ("Requests", "reqps", [(REQUESTS, "{{handler}} {{status}}")]),
        (
            "Tokens",
            "short",
            [
                (worker_rate("vllm:prompt_tokens_total"), "prompt"),
                (worker_rate("vllm:generation_tokens_total"), "output"),
            ],
        ),
        ("Ends of choices", "short", [(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")]),
        ("Errors", "short", [(rate("penstock:request_errors_total", "code"), "{{code}}")]),
        ("Prompt length", "short", percentiles("vllm:request_prompt_tokens")),
        ("Output length", "short", percentiles("vllm:request_generation_tokens")),
    ],
    "Latency": [
        ("Time to first token", "s", percentiles("vllm:time_to_first_token_seconds")),
        ("Between tokens", "s", percentiles("penstock:inter_token_latency_seconds")),
        ("Whole request", "s", percentiles("penstock:e2e_request_latency_seconds")),
        ("Waiting at workers", "s", percentiles("penstock:request_queue_time_seconds")),
        ("Prefill", "s", percentiles("penstock:request_prefill_time_seconds")),
        ("Decode", "s", percentiles("penstock:request_decode_time_seconds")),
    ],
    "Engine": [
        ("Running", "short", [(worker_level("vllm:num_requests_running", "engine"), ENGINE)]),
        (
            "Waiting",
            "short",
            [(worker_level("vllm:num_requests_waiting_by_reason", "engine, reason"), "{{engine}} {{reason}}")],
        ),
        ("KV pages in use", "percentunit", [(worker_level("vllm:kv_cache_usage_perc", "engine"), ENGINE)]),
        (
            "Prefix cache hits",
            "percentunit",
            [(f"{worker_rate(HITS, 'engine')} / {worker_rate(QUERIES, 'engine')}", ENGINE)],
        ),
        ("Tokens of a step", "short", percentiles("vllm:iteration_tokens_total", worker_rate)),
        ("Preemptions", "short", [(worker_rate("vllm:num_preemptions_total", "engine"), ENGINE)]),
    ],
    "Hand-off": [
        ("Bytes moved", "Bps", [(worker_rate("penstock:kv_transfer_bytes_total", "engine"), ENGINE)]),
        ("Transfer of a prompt", "s", percentiles("penstock:handoff_seconds")),
        ("Exposed part of a transfer", "s", percentiles("penstock:handoff_exposed_seconds")),
        ("Hand-offs by transport", "short", [(rate("penstock:handoff_bytes_count", "transport"), "{{transport}}")]),
        (
            "Failures",
            "short",
            [
                (worker_rate("penstock:handoff_failures_total"), "hand-offs given up"),
                (worker_rate("penstock:kv_checksum_failures_total"), "pages with a wrong checksum"),
                (worker_rate("vllm:nixl_num_kv_expired_reqs_total"), "loans expired"),
            ],
        ),
        (
            "Page ledger",
            "short",
            [
                (worker_level(f"penstock:kv_pages_{kind}", "engine"), f"{ENGINE} {kind}")
                for kind in ("lent", "promised", "quarantined")
            ],
        ),
    ],
    "Router": [
        (
            "In flight",
            "short",
            [(level("penstock:in_flight"), "choices"), (level("penstock:reserved_tokens"), "reserved tokens")],
        ),
        (
            "Retries and losses",
            "short",
            [
                (rate("penstock:retries_total"), "retries"),
                (LOST, "workers lost"),
                (rate("penstock:failed_total"), "choices failed"),
            ],
        ),
        (
            "Turned away",
            "short",
            [
                (turned_away("overloaded"), "overloaded"),
                (turned_away("queue_full"), "queue full"),
                (turned_away("slo_unattainable"), "objective out of reach"),
                (turned_away("queue_timeout"), "no room in time"),
                (turned_away("unavailable"), "no worker"),
            ],
        ),
        (
            "Prefix hits, predicted and realised",
            "short",
            [(rate(f"penstock:{kind}_hit_tokens_total"), kind) for kind in ("predicted", "realised", "missed")],
        ),
        (
            "Linked workers",
            "short",
            [(level("penstock:links", "min"), "links"), (worker_level("penstock:draining"), "draining")],
        ),
        ("Router's processor", "percentunit", [(PROCESSOR, "{{instance}}")]),
    ],
    "Redis": [
        (
            "Answers",
            "short",
            [(level("penstock:redis_up", "min"), "routers"), (level("penstock:registered", "min"), "workers")],
        ),
        ("Failures", "short", [(rate("penstock:redis_failures_total"), "a second")]),
        ("Look-up of a prefix", "s", percentiles("penstock:index_lookup_seconds")),
    ],
}


def dashboard() -> dict[str, Any]:
    """As Grafana's provisioning reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, contents in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "gridPos": _place(0, y, WIDTH, 1)})
        y += 1
        for number, (title, unit, queries) in enumerate(contents):
            width = WIDTH // PER_ROW
            place = _place(number % PER_ROW * width, y + number // PER_ROW * HEIGHT, width, HEIGHT)
            panels.append(_panel(len(panels) + 1, title, unit, queries) | {"gridPos": place})
        y += -(-len(contents) // PER_ROW) * HEIGHT
    return {
        "uid": "penstock",
        "title": "Penstock",
        "tags": ["penstock"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_source(), _models()]},
        "panels": panels,
    }


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(number: int, title: str, unit: str, queries: list[Query]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend, "datasource": source}
            for place, (query, legend) in enumerate(queries)
        ],
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _models() -> dict[str, Any]:
    return {
        "name": "model_name",
        "label": "Model",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": "label_values(penstock:links, model_name)",
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }


def main() -> None:
    """Write the file."""
    OUTPUT.write_text(text())


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    main()
