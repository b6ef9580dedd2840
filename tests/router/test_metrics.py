"""/metrics after known traffic: vLLM's names, router and worker figures."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from penstock.common.errors import Overloaded
from penstock.common.messages import GenerateRequest, Spans
from penstock.router.http_metrics import HttpMeter, HttpMetrics
from tests.router.fake_router import ANSWER, SPANS, Router, ids_of, running
from tests.router.test_stalled import until


def scrape(router: Router) -> dict[tuple[str, str], float]:
    """(sample name, engine or other label) -> value; buckets left out."""
    found = {}
    for family in text_string_to_metric_families(router.http.get("/metrics").text):
        for sample in family.samples:
            if not sample.name.startswith(("vllm:", "penstock:")) or "websocket" in sample.name:
                continue
            assert sample.labels["model_name"] == "tiny"
            extra = sample.labels.get("finished_reason") or sample.labels.get("code") or sample.labels["engine"]
            if "le" not in sample.labels:
                found[sample.name, extra] = sample.value
    return found


def test_figures() -> None:
    with running() as router:
        create = router.openai.completions.create
        create(model="tiny", prompt="a", max_tokens=99, n=2)
        create(model="tiny", prompt=[5] * 10, max_tokens=3)
        list(create(model="tiny", prompt="a", max_tokens=99, stream=True))
        router.service.refusal = Overloaded("full")
        assert router.post("/v1/completions", {"prompt": "a"}).status_code == 429
        assert router.post("/v1/completions", {"prompt": ""}).status_code == 400
        found = scrape(router)
    tokens = len(ids_of(ANSWER)) + 1
    assert found["vllm:request_success_total", "stop"] == 3
    assert found["vllm:request_success_total", "length"] == 1
    assert found["penstock:request_errors_total", "overloaded"] == 1
    assert found["penstock:request_errors_total", "invalid_request"] == 1
    assert found["vllm:request_generation_tokens_sum", "router"] == 3 * tokens + 3
    assert found["vllm:request_prompt_tokens_sum", "router"] == 1 + 1 + 10 + 1
    assert found["vllm:time_to_first_token_seconds_count", "router"] == 4
    assert found["vllm:inter_token_latency_seconds_count", "router"] == 3 * (tokens - 1) + 2
    assert found["vllm:request_time_per_output_token_seconds_count", "router"] == 4
    assert found["vllm:e2e_request_latency_seconds_count", "router"] == 4
    assert found["vllm:request_prefill_time_seconds_sum", "router"] == pytest.approx(4 * 0.02)
    assert found["vllm:request_queue_time_seconds_sum", "router"] == pytest.approx(4 * 0.0015)
    assert found["vllm:request_params_n_sum", "router"] == 2 + 1 + 1 + 1  # the refused one was valid
    assert found["vllm:request_params_max_tokens_sum", "router"] == 99 + 3 + 99 + 16
    assert found["vllm:request_max_num_generation_tokens_sum", "router"] == 2 * tokens + 3
    assert found["vllm:request_max_num_generation_tokens_count", "router"] == 3  # once for n = 2
    assert found["vllm:request_prefill_kv_computed_tokens_sum", "router"] == 4 * SPANS.computed_tokens
    assert found["penstock:handoff_exposed_seconds_sum", "router"] == pytest.approx(4 * 0.001)
    assert found["penstock:retries_total", "router"] == 4
    assert found["vllm:num_requests_running", "decode-0"] == 3
    assert found["vllm:num_requests_waiting", "decode-0"] == 2
    assert found["vllm:kv_cache_usage_perc", "decode-0"] == 0.25
    assert found["penstock:kv_transfer_bytes_total", "decode-0"] == 4096
    assert found["penstock:kv_pages_lent", "decode-0"] == 5


def test_a_prefix_that_was_fetched_is_no_hand_off() -> None:
    """As it is for a prefill worker that fetches it, and for the worker to which a request has moved."""
    fetched = Spans(worker="prefill-0", transport="tcp", fetch_bytes=512, source="decode-1")
    with running() as router:
        script = router.service.script

        def fetching(request: GenerateRequest) -> list[Any]:
            first, *more = script(request)
            return [replace(first, spans=fetched), *more]

        router.service.script = fetching
        router.openai.completions.create(model="tiny", prompt="a", max_tokens=99)
        found = scrape(router)
    assert found["penstock:handoff_bytes_count", "router"] == 1
    assert found["penstock:handoff_bytes_sum", "router"] == SPANS.transfer_bytes


def test_buckets_are_cumulative() -> None:
    with running() as router:
        router.openai.completions.create(model="tiny", prompt=[5] * 10)
        router.openai.completions.create(model="tiny", prompt=[5] * 60)
        families = {f.name: f for f in text_string_to_metric_families(router.http.get("/metrics").text)}
    samples = families["vllm:request_prompt_tokens"].samples
    buckets = {s.labels["le"]: s.value for s in samples if s.name.endswith("_bucket")}
    assert (buckets["5.0"], buckets["10.0"], buckets["50.0"], buckets["100.0"], buckets["+Inf"]) == (0, 1, 1, 2, 2)
    assert max(float(bound) for bound in buckets if bound != "+Inf") == 500  # the context is 512 tokens


def test_finer_steps_stand_under_our_own_name() -> None:
    with running() as router:
        router.openai.completions.create(model="tiny", prompt="a")
        families = {f.name: f for f in text_string_to_metric_families(router.http.get("/metrics").text)}
    bounds = {
        prefix: {s.labels["le"] for s in families[f"{prefix}:inter_token_latency_seconds"].samples if "le" in s.labels}
        for prefix in ("vllm", "penstock")
    }
    assert bounds["penstock"] - bounds["vllm"] == {"0.001", "0.0025", "0.005"} and bounds["vllm"] < bounds["penstock"]


def test_http_requests_are_told_apart() -> None:
    with running() as router:
        list(router.openai.completions.create(model="tiny", prompt="a", stream=True))
        assert router.post("/v1/completions", {"prompt": ""}).status_code == 400
        assert router.http.get("/v1/models/tiny").status_code == 200
        assert router.http.get("/nowhere").status_code == 404
        assert router.http.get("/health").status_code == 200  # not counted
        families = {f.name: f for f in text_string_to_metric_families(router.http.get("/metrics").text)}
    counts = {
        (s.labels["method"], s.labels["handler"], s.labels["status"]): s.value
        for s in families["http_requests"].samples
        if s.name == "http_requests_total"
    }
    assert counts == {
        ("POST", "/v1/completions", "2xx"): 1,
        ("POST", "/v1/completions", "4xx"): 1,
        ("GET", "/v1/models/{name:path}", "2xx"): 1,
        ("GET", "none", "4xx"): 1,
    }
    durations = families["http_request_duration_highr_seconds"].samples
    assert [s.value for s in durations if s.name.endswith("_count")] == [4]


def statuses(metrics: HttpMetrics) -> dict[str, float]:
    [family] = [family for family in metrics.collect() if family.name == "http_requests"]
    return {sample.labels["status"]: sample.value for sample in family.samples}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_answer_is_no_fault_of_the_server(stream: bool) -> None:
    """Of whom the alert PenstockServerErrors would tell."""
    with running() as router:
        router.service.pause_after = 0
        body = json.dumps({"prompt": "a", "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(router.url.rpartition(":")[2]))) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            until(lambda: router.service.quiet)  # a worker has it
        http = router.server.config.app.state.metrics.http  # type: ignore[union-attr]
        until(lambda: statuses(http))
        assert statuses(http) == {"4xx": 1}


@pytest.mark.parametrize(("started", "status"), [(False, "5xx"), (True, "2xx")])
def test_an_application_that_fails_is_a_fault_of_the_server(started: bool, status: str) -> None:
    async def app(_: Any, __: Any, send: Any) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200})
        raise ValueError

    async def send(_: Any) -> None: ...

    metrics = HttpMetrics()
    meter, scope = HttpMeter(app, metrics, frozenset({"/a"})), {"type": "http", "path": "/a", "method": "GET"}
    with pytest.raises(ValueError):
        asyncio.run(meter(scope | {"headers": []}, send, send))  # type: ignore[arg-type]
    assert statuses(metrics) == {status: 1}
