"""What a live fleet tells, 1 + 1 and one-phase: a scrape against vLLM's list and the traffic, traces, JSON logs."""

from __future__ import annotations

import io
import json
import re
import runpy
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from penstock.console import Console
from penstock.fleet import Fleet
from tests.system.fleets import complete_all, fleet
from tests.system.otlp_receiver import Collector, http_collector
from tests.system.prometheus import PROMTOOL, needs_prometheus, prometheus
from tests.vllm_metrics import ANNOUNCED, Expected, served_always

pytestmark = pytest.mark.system
COMPOSE = Path(__file__).resolve().parents[2] / "compose"
CONTEXT = 256
PROMPTS = [[5 + i, *range(20, 60)] for i in range(3)]
OUTPUT = 4


@dataclass
class Observed:
    """A fleet, what it wrote, and the collector that its traces go to."""

    fleet: Fleet
    output: io.StringIO
    collector: Collector

    def records(self) -> list[dict[str, Any]]:
        """Its log so far; every line is JSON."""
        return [json.loads(line) for line in self.output.getvalue().splitlines()]


def paired(fleet: Fleet) -> bool:
    return fleet.config.prefill_workers > 0


@pytest.fixture(scope="module", params=["pair", "one-phase"])
def observed(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Observed]:
    output = io.StringIO()
    options: dict[str, Any] = {"log_format": "json", "enable_log_requests": True, "max_model_len": CONTEXT}
    options["routing_policy"] = "round-robin"  # hands every long prompt off
    with (
        http_collector() as collector,
        fleet(
            checkpoints["llama"],
            console=Console(output, json_lines=True),
            prefill_workers=int(request.param == "pair"),
            otlp_traces_endpoint=collector.endpoint,
            **options,
        ) as running,
    ):
        complete_all(running, PROMPTS, OUTPUT)
        yield (one := Observed(running, output, collector))
    # The routers leave first, and say so; then the workers, to each other. Nobody takes anybody for lost.
    records = one.records()
    left = [number for number, record in enumerate(records) if record["message"].startswith("peer router-")]
    assert len(left) == len(running.placements) and all(records[n]["message"].endswith(" has left") for n in left)
    assert [record for record in records[left[0] :] if record["level"] == "WARNING"] == []


@pytest.fixture(scope="module")
def running(observed: Observed) -> Fleet:
    return observed.fleet


def scrape(url: str) -> dict[str, Metric]:
    """Families by the name that a scrape shows."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    families = list(text_string_to_metric_families(text))
    names = [f"{family.name}_total" if family.type == "counter" else family.name for family in families]
    assert len(set(names)) == len(names), "a family appears twice"
    return dict(zip(names, families, strict=True))


def settled(running: Fleet) -> dict[str, Metric]:
    """A scrape of the router after its workers' last heartbeats."""
    deadline = time.monotonic() + 60
    while True:
        found = scrape(running.url)
        if total(found, "vllm:generation_tokens_total") >= len(PROMPTS) * OUTPUT:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.1)


def total(found: dict[str, Metric], name: str, suffix: str = "", **labels: str) -> float:
    return sum(
        sample.value
        for sample in found[name].samples
        if sample.name == name + suffix and labels.items() <= sample.labels.items()
    )


def check(name: str, family: Metric, expected: Expected) -> None:
    assert family.type == expected.type, name
    labels = set(expected.labels) | (set() if expected.own else {"model_name", "engine"})
    assert family.samples, name
    for sample in family.samples:
        assert set(sample.labels) - {"le"} == labels, name
        if not expected.own:
            assert sample.labels["model_name"] == "tiny", name
    if expected.buckets:
        bounds = sorted({float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")})
        assert bounds == [*map(float, expected.buckets), float("inf")], name
    if expected.values:
        assert sorted({sample.labels[expected.labels[-1]] for sample in family.samples}) == sorted(expected.values)


def test_a_scrape_of_the_router_has_all_of_vllms_metrics(running: Fleet) -> None:
    found = settled(running)
    for name, expected in served_always(CONTEXT).items():
        assert name in found, f"{name} is missing"
        check(name, found[name], expected)
    for name, kind in ANNOUNCED.items():
        assert found[name].type == kind, name
    ours = [name for name in found if name.startswith("penstock:")]
    assert all("_total" not in name.removesuffix("_total") for name in ours)
    # Nothing moves within a worker, and where there is but one nobody asks who holds what.
    for name in ("penstock:handoff_seconds", "penstock:handoff_bytes", "penstock:index_lookup_seconds"):
        assert (total(found, name, "_count") > 0) == paired(running), name
    assert {sample.labels["transport"] for sample in found["penstock:handoff_bytes"].samples} <= {"shm", "tcp"}


def test_figures_are_those_of_the_traffic(running: Fleet) -> None:
    found = settled(running)
    prompt_tokens, output_tokens = sum(map(len, PROMPTS)), len(PROMPTS) * OUTPUT
    assert total(found, "vllm:prompt_tokens_total") == prompt_tokens  # once, though two workers have seen them
    received = total(found, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
    assert 0 < received <= prompt_tokens if paired(running) else received == 0
    assert received == total(found, "vllm:external_prefix_cache_hits_total")
    assert total(found, "vllm:generation_tokens_total") == output_tokens
    assert total(found, "vllm:request_generation_tokens", "_sum") == output_tokens
    assert total(found, "vllm:request_max_num_generation_tokens", "_sum") == output_tokens
    assert total(found, "vllm:request_prompt_tokens", "_sum") == prompt_tokens
    assert total(found, "vllm:request_success_total", finished_reason="length") == len(PROMPTS)
    steps = total(found, "vllm:iteration_tokens_total", "_count")
    assert steps == total(found, "penstock:engine_steps_total") > 0
    moved = total(found, "penstock:kv_transfer_bytes_total")
    assert (
        total(found, "vllm:nixl_bytes_transferred", "_sum") == total(found, "penstock:handoff_bytes", "_sum") == moved
    )
    assert total(found, "http_requests_total", handler="/v1/completions", status="2xx") == len(PROMPTS)


def test_the_transport_of_each_pair_is_named(running: Fleet) -> None:
    found = settled(running)
    workers = {
        worker["worker_id"]: worker for worker in httpx.get(f"{running.url}/fleet", timeout=60).json()["workers"]
    }
    expected = {"prefill-0": {}, "decode-0": {"prefill-0": "shm"}} if paired(running) else {"decode-0": {}}
    assert {worker_id: worker["transports"] for worker_id, worker in workers.items()} == expected
    counts = {
        name: total(found, "penstock:kv_transport_peers", transport=name) for name in ("cuda_ipc", "shm", "nixl", "tcp")
    }
    assert counts == {"cuda_ipc": 0, "shm": paired(running), "nixl": 0, "tcp": 0}


def test_workers_show_themselves_as_the_router_shows_them(running: Fleet) -> None:
    router = settled(running)
    for worker_id, url in running.status_urls().items():
        own = scrape(url)
        for name, family in own.items():
            if name.startswith(("vllm:", "penstock:")):
                assert family.type == router[name].type
                assert {sample.labels["engine"] for sample in family.samples} == {worker_id}


# ------------------------------------------------------------ traces and logs: one request, followed

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = [9, *range(100, 150)]


@pytest.fixture(scope="module")
def followed(observed: Observed) -> dict[str, Any]:
    """The answer to a request that came with a trace context and an id of its own."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "ignore_eos": True, "timeline": True, "n": 1}
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1", "x-request-id": "mine"}
    answer = httpx.post(f"{observed.fleet.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}


def test_a_trace_spans_router_prefill_transfer_and_decode(observed: Observed, followed: dict[str, Any]) -> None:
    trace_id = bytes.fromhex(TRACE)
    two_phases = paired(observed.fleet)
    computing = {"queue", "prefill", "decode"} | ({"transfer"} if two_phases else set())
    names = {"llm_request", "tokenise", "route"} | ({"admission"} if two_phases else set()) | computing
    everything = observed.collector.wait(lambda spans: names <= {s.name for s in spans if s.trace_id == trace_id})
    spans = {span.name: span for span in everything if span.trace_id == trace_id}
    root = spans["llm_request"]
    assert root.parent_span_id == bytes.fromhex(CALLER) and root.trace_state == "vendor=1"
    assert root.kind == root.SPAN_KIND_SERVER
    for name in names - {"llm_request"}:
        assert spans[name].parent_span_id == root.span_id, name
        assert spans[name].start_time_unix_nano <= spans[name].end_time_unix_nano
        assert spans[name].end_time_unix_nano <= root.end_time_unix_nano, name
    entries = {entry["name"]: entry for entry in followed["timeline"]}
    for name in computing:  # the body's timeline tells the same
        length_ms = (spans[name].end_time_unix_nano - spans[name].start_time_unix_nano) / 1e6
        assert length_ms == pytest.approx(entries[name]["ms"], abs=0.01), name
    told = attributes(root)
    assert told["gen_ai.request.id"] == "mine" and told["gen_ai.response.model"] == "tiny"
    assert (told["gen_ai.usage.prompt_tokens"], told["gen_ai.usage.completion_tokens"]) == (len(PROMPT), 5)
    assert told["gen_ai.request.max_tokens"] == 5 and told["penstock.outcome"] == "length"
    assert 0 < told["gen_ai.latency.time_to_first_token"] < told["gen_ai.latency.e2e"]
    workers = {name: attributes(spans[name])["penstock.worker"] for name in computing - {"queue"}}
    if two_phases:
        assert workers == {"prefill": "prefill-0", "transfer": "decode-0", "decode": "decode-0"}
        assert attributes(spans["transfer"])["penstock.transport"] == entries["transfer"]["transport"]
    else:
        assert workers == {"prefill": "decode-0", "decode": "decode-0"}
    assert {"service.name": "penstock"}.items() <= observed.collector.resources[0].items()


def test_requests_without_a_context_have_traces_of_their_own(observed: Observed) -> None:
    def roots(spans: list[Any]) -> list[Any]:
        return [span for span in spans if span.name == "llm_request" and not span.parent_span_id]

    found = roots(observed.collector.wait(lambda spans: len(roots(spans)) >= len(PROMPTS)))
    assert len({span.trace_id for span in found}) == len(found)


def test_refused_requests_are_traced_as_errors(observed: Observed) -> None:
    answer = httpx.post(f"{observed.fleet.url}/v1/completions", json={"model": "tiny", "prompt": ""}, timeout=60)
    assert answer.status_code == 400

    def refused(spans: list[Any]) -> list[Any]:
        return [span for span in spans if attributes(span).get("penstock.outcome") == "invalid_request"]

    [span] = refused(observed.collector.wait(lambda spans: bool(refused(spans))))
    assert span.status.code == span.status.STATUS_CODE_ERROR


def test_every_process_logs_the_request_under_its_id(observed: Observed, followed: dict[str, Any]) -> None:
    deadline = time.monotonic() + 60
    processes = {"router", "prefill-0", "decode-0"} if paired(observed.fleet) else {"router", "decode-0"}
    while len(about := [r for r in observed.records() if r.get("trace_id") == TRACE]) < len(processes):
        assert time.monotonic() < deadline, about
        time.sleep(0.05)
    [request_id] = {record["request_id"] for record in about}
    by_process = {record["process"]: record for record in about}
    assert by_process.keys() == processes
    router, decode = by_process["router"], by_process["decode-0"]
    assert router["client_request_id"] == "mine" and request_id != "mine"
    assert (router["outcome"], router["prompt_tokens"], router["output_tokens"]) == ("length", len(PROMPT), 5)
    assert 0 < router["first_token_ms"] < router["total_ms"]
    assert (decode["reason"], decode["output_tokens"]) == ("length", 5)
    if paired(observed.fleet):
        prefill = by_process["prefill-0"]
        assert (prefill["reason"], prefill["computed_tokens"]) == ("handoff", len(PROMPT))
        assert decode["transfer_bytes"] > 0
    for record in observed.records():
        assert {"time", "level", "process", "message"} <= record.keys()
    assert processes <= {record["process"] for record in observed.records()}


# ------------------------------------------------------------ the dashboard and the alerts, over a real Prometheus


def panel_queries() -> list[tuple[str, str]]:
    """(panel, query) with Grafana's variables filled in."""
    found = []
    for panel in json.loads((COMPOSE / "grafana" / "dashboards" / "penstock.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$model_name", ".*")
            assert "$" not in query
            found.append((panel["title"], query))
    return found


def rule_figures() -> list[tuple[str, str]]:
    """(alert, its expression without the limit at its end)."""
    groups = yaml.safe_load((COMPOSE / "prometheus" / "alerts.yml").read_text())["groups"]
    found = []
    for rule in (rule for group in groups for rule in group["rules"]):
        figure = re.fullmatch(r"(.*) [<>] [\d.]+", rule["expr"], re.DOTALL)
        assert figure is not None, rule["alert"]
        found.append((rule["alert"], figure[1]))
    return found


@needs_prometheus
@pytest.mark.parametrize("observed", ["pair"], indirect=True)  # some panels are of hand-offs
def test_every_panel_and_every_rule_finds_data(observed: Observed, tmp_path: Path) -> None:
    """Asked while the fleet works; nothing that watches for trouble fires."""
    wanted = panel_queries() + rule_figures()
    with prometheus(tmp_path, observed.fleet.url) as server:
        deadline = time.monotonic() + 60
        seed = 0
        while missing := [name for name, query in wanted if not server.values(query)]:
            assert time.monotonic() < deadline, f"without data: {missing}"
            prompts = [[30 + seed % 50, 30 + seed // 50, *range(40, 70)] for seed in range(seed, seed + 3)]
            complete_all(observed.fleet, prompts, OUTPUT, spread_s=0.0)
            httpx.post(f"{observed.fleet.url}/v1/completions", json={"model": "tiny", "prompt": ""}, timeout=60)
            seed += 3
        rules = [rule for group in server.get("/api/v1/rules")["groups"] for rule in group["rules"]]
        assert {rule["name"] for rule in rules} == {name for name, _ in rule_figures()}
        assert all(rule["health"] in ("ok", "unknown") for rule in rules), rules
        assert {rule["name"] for rule in rules if rule["state"] == "firing"} == set()


@needs_prometheus
def test_promtool_accepts_configuration_and_rules() -> None:
    assert PROMTOOL is not None
    command = [PROMTOOL, "check", "config", str(COMPOSE / "prometheus" / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_what_its_program_writes() -> None:
    folder = COMPOSE / "grafana"
    names = runpy.run_path(str(folder / "make_dashboard.py"))
    assert names["text"]() == (folder / "dashboards" / "penstock.json").read_text()


def test_every_alert_has_a_line_in_the_documentation() -> None:
    text = (COMPOSE.parent / "docs" / "observability.md").read_text()
    for name, _ in rule_figures():
        assert f"| `{name}` |" in text, name
