"""benchmarks/simulator_truth.py: its load, and how it reads what workers measured. The fleet itself takes minutes."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from benchmarks import simulator_truth
from benchmarks.simulator_truth import PAGE, generated, rates_in
from penstock.common.messages import MeasuredRates, WorkerLoad
from penstock.common.worker_metrics import worker_metric_families
from penstock.router.rates import H200_LLAMA8B
from tests.router.test_fleet import ONE


def test_the_load_is_what_its_trace_says():
    asked = generated(60, 1000, seed=3)
    assert asked == generated(60, 1000, seed=3)
    known: dict[int, list[int]] = {}
    for one in asked:
        assert len(one.tokens) == one.traced.prompt_tokens == PAGE * len(one.traced.pages)
        for place, page in enumerate(one.traced.pages):
            tokens = one.tokens[place * PAGE : (place + 1) * PAGE]
            assert known.setdefault(page, tokens) == tokens, "a page has one content"
    assert len({tuple(tokens) for tokens in known.values()}) == len(known)
    shared = sum(len(one.traced.pages) for one in asked) / len(known)
    assert shared > 1.2, "prompts begin alike"
    others = {page for one in generated(60, 1000, seed=4) for page in one.traced.pages}
    assert not others & known.keys()
    assert max(map(len, (one.tokens for one in asked))) < 2048, "the model's context"
    assert simulator_truth.page_tokens(5, 1000) == simulator_truth.page_tokens(5, 1000)


def exposition(families: list[Metric]) -> str:
    class Families(Collector):
        def collect(self) -> list[Metric]:
            return families

    registry = CollectorRegistry()
    registry.register(Families())
    return generate_latest(registry).decode()


def test_rates_are_read_from_metrics():
    def load(rate: float) -> WorkerLoad:
        return WorkerLoad(rates=MeasuredRates(prefill_tokens_per_s=rate, prefill_step_ms=4.0))

    names = {"decode-0": 1000.0, "decode-1": 3000.0}
    rows = [(msgspec.structs.replace(ONE, worker_id=name), load(rate)) for name, rate in names.items()]
    found = rates_in(exposition(worker_metric_families("m", rows)))
    assert (found.prefill_tokens_per_s, found.prefill_step_ms) == pytest.approx((2000.0, 4.0))
    assert found.decode_step_ms == H200_LLAMA8B.decode_step_ms, "nothing was measured of it"
