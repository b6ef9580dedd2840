"""Writes dashboards/penstock.json, which Grafana shows, from the rows below: python compose/grafana/make_dashboard.py

A panel is a title, a unit of Grafana's, and queries with their legends. `{m}` stands for the choice of a model. A test
asks a Prometheus that watches a live fleet every query, and compares the file with what this program would write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parent / "dashboards" / "penstock.json"
M = 'model_name=~"$model_name"'
WIDTH, HEIGHT, PER_ROW = 24, 8, 3

Query = tuple[str, str]  # PromQL, legend


def rate(metric: str, by: str = "", more: str = "") -> str:
    """What a counter grows by a second, summed."""
    labels = f"{M},{more}" if more else M
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}[$__rate_interval]))"


def percentiles(metric: str) -> list[Query]:
    """Percentiles and mean of a histogram."""
    found = [
        (f"histogram_quantile({part}, {rate(metric + '_bucket', 'le')})", f"p{round(part * 100)}")
        for part in (0.5, 0.9, 0.99)
    ]
    return [*found, (share(f"{metric}_sum", f"{metric}_count"), "mean")]


def share(part: str, whole: str, by: str = "") -> str:
    """What `part` grows by, for each that `whole` does."""
    return f"{rate(part, by)} / {rate(whole, by)}"


def level(metric: str, by: str = "", how: str = "sum") -> str:
    """A gauge as it stands."""
    return f"{how}{f' by ({by})' if by else ''} ({metric}{{{M}}})"


def turned_away(code: str) -> str:
    """Requests refused with an error code; 0 as long as there was none."""
    return rate("penstock:request_errors_total", more=f'code="{code}"') + " or vector(0)"


REQUESTS = "sum by (handler, status) (rate(http_requests_total[$__rate_interval]))"
PROCESSOR = 'rate(process_cpu_seconds_total{job="penstock"}[$__rate_interval])'
ENGINE = "{{engine}}"

ROWS: dict[str, list[tuple[str, str, list[Query]]]] = {
    "Traffic": [
        ("Requests", "reqps", [(REQUESTS, "{{handler}} {{status}}")]),
        (
            "Tokens",
            "short",
            [(rate("vllm:prompt_tokens_total"), "prompt"), (rate("vllm:generation_tokens_total"), "output")],
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
        ("Running", "short", [(level("vllm:num_requests_running", "engine"), ENGINE)]),
        (
            "Waiting",
            "short",
            [(level("vllm:num_requests_waiting_by_reason", "engine, reason"), "{{engine}} {{reason}}")],
        ),
        ("KV pages in use", "percentunit", [(level("vllm:kv_cache_usage_perc", "engine"), ENGINE)]),
        (
            "Prefix cache hits",
            "percentunit",
            [(share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "engine"), ENGINE)],
        ),
        ("Tokens of a step", "short", percentiles("vllm:iteration_tokens_total")),
        ("Preemptions", "short", [(rate("vllm:num_preemptions_total", "engine"), ENGINE)]),
    ],
    "Hand-off": [
        ("Bytes moved", "Bps", [(rate("penstock:kv_transfer_bytes_total", "engine"), ENGINE)]),
        ("Transfer of a prompt", "s", percentiles("penstock:handoff_seconds")),
        ("Exposed part of a transfer", "s", percentiles("penstock:handoff_exposed_seconds")),
        ("Hand-offs by transport", "short", [(rate("penstock:handoff_bytes_count", "transport"), "{{transport}}")]),
        (
            "Failures",
            "short",
            [
                (rate("penstock:handoff_failures_total"), "hand-offs given up"),
                (rate("penstock:kv_checksum_failures_total"), "pages with a wrong checksum"),
                (rate("vllm:nixl_num_kv_expired_reqs_total"), "loans expired"),
            ],
        ),
        (
            "Page ledger",
            "short",
            [
                (level(f"penstock:kv_pages_{kind}", "engine"), f"{ENGINE} {kind}")
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
                (rate("penstock:workers_lost_total"), "workers lost"),
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
        ("Linked workers", "short", [(level("penstock:links"), "links"), (level("penstock:draining"), "draining")]),
        ("Router's processor", "percentunit", [(PROCESSOR, "{{instance}}")]),
    ],
    "Redis": [
        (
            "Answers",
            "short",
            [(level("penstock:redis_up", how="min"), "routers"), (level("penstock:registered", how="min"), "workers")],
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
