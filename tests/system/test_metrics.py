"""A live scrape of a 1 + 1 fleet against the list of vLLM's metrics, and its figures against the traffic sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from penstock.fleet import Fleet
from tests.system.fleets import complete_all, fleet
from tests.vllm_metrics import ANNOUNCED, Expected, served_always

pytestmark = pytest.mark.system
CONTEXT = 256
PROMPTS = [[5 + i, *range(20, 60)] for i in range(3)]
OUTPUT = 4


@pytest.fixture(scope="module")
def running(checkpoints: dict[str, Path]) -> Iterator[Fleet]:
    with fleet(checkpoints["llama"], prefill_workers=1, max_model_len=CONTEXT) as running:
        complete_all(running, PROMPTS, OUTPUT)
        yield running


def scrape(url: str) -> dict[str, Metric]:
    """Families by the name that a scrape shows."""
    text = httpx.get(f"{url}/metrics", timeout=20).text
    families = list(text_string_to_metric_families(text))
    names = [f"{family.name}_total" if family.type == "counter" else family.name for family in families]
    assert len(set(names)) == len(names), "a family appears twice"
    return dict(zip(names, families, strict=True))


def settled(running: Fleet) -> dict[str, Metric]:
    """A scrape of the router after its workers' last heartbeats."""
    import time

    deadline = time.monotonic() + 30
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
    for name in ("penstock:handoff_seconds", "penstock:handoff_bytes", "penstock:index_lookup_seconds"):
        assert total(found, name, "_count") > 0, name
    assert {sample.labels["transport"] for sample in found["penstock:handoff_bytes"].samples} <= {"shm", "nixl"}


def test_figures_are_those_of_the_traffic(running: Fleet) -> None:
    found = settled(running)
    prompt_tokens, output_tokens = sum(map(len, PROMPTS)), len(PROMPTS) * OUTPUT
    assert total(found, "vllm:prompt_tokens_total") == prompt_tokens  # once, though two workers have seen them
    received = total(found, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
    assert 0 < received <= prompt_tokens
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


def test_workers_show_themselves_as_the_router_shows_them(running: Fleet) -> None:
    router = settled(running)
    for worker_id, url in running.status_urls().items():
        own = scrape(url)
        for name, family in own.items():
            if name.startswith(("vllm:", "penstock:")):
                assert family.type == router[name].type
                assert {sample.labels["engine"] for sample in family.samples} == {worker_id}
