"""Prometheus metrics of a router and of the workers it sees, under vLLM's names where they mean the same.

Router figures (engine="router") are kept in plain Python, so that a token costs one bisect; worker figures
(engine=<worker id>) are read from their last heartbeat at scrape time. One `RouterMetrics` per app, served at /metrics.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.common.messages import Spans
from penstock.common.worker_metrics import worker_metric_families

if TYPE_CHECKING:
    from penstock.router.service import RouterService

TO_FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
PER_TOKEN = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
PER_REQUEST = (
    0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)


class Buckets:
    """One histogram in plain Python; not thread-safe, as everything in the router's loop."""

    __slots__ = ("_bounds", "_counts", "_help", "_name", "_sum")

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self._name, self._help, self._bounds = name, help, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, labels: dict[str, str]) -> HistogramMetricFamily:
        """As Prometheus wants it: cumulative counts by upper bound."""
        total, cumulative = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            cumulative.append((bound, float(total)))
        family = HistogramMetricFamily(self._name, self._help, labels=list(labels))
        family.add_metric(list(labels.values()), cumulative, self._sum)
        return family


class RouterMetrics(Collector):
    """What the router measures, and the registry that also shows its workers."""

    def __init__(self, service: RouterService, model_name: str) -> None:
        self._service = service
        self._model_name = model_name
        self._finished: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        new = self._histogram
        self._histograms: list[Buckets] = []
        self.time_to_first_token = new("time_to_first_token_seconds", "Received until the first token.", TO_FIRST)
        self.inter_token_latency = new("inter_token_latency_seconds", "Between two token messages.", PER_TOKEN)
        self._time_per_token = new(
            "request_time_per_output_token_seconds", "Mean time of a request's tokens after the first.", PER_TOKEN
        )
        self._latency = new("e2e_request_latency_seconds", "Received until finished.", PER_REQUEST)
        self._queue = new("request_queue_time_seconds", "Waiting at workers.", PER_REQUEST)
        self._inference = new("request_inference_time_seconds", "Prefill and decode.", PER_REQUEST)
        self._prefill = new("request_prefill_time_seconds", "Computing the prompt.", PER_REQUEST)
        self._decode = new("request_decode_time_seconds", "Decoding.", PER_REQUEST)
        self._prompt_tokens = new("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._generation_tokens = new("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._max_tokens = new("request_params_max_tokens", "max_tokens asked for.", TOKENS)
        self._n = new("request_params_n", "n asked for.", CHOICES)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def _histogram(self, name: str, help: str, bounds: Sequence[float]) -> Buckets:
        buckets = Buckets(f"vllm:{name}", help, bounds)
        self._histograms.append(buckets)
        return buckets

    def request(self, n: int, max_tokens: int) -> None:
        """One HTTP request was accepted."""
        self._n.observe(n)
        self._max_tokens.observe(max_tokens)

    def finished(
        self,
        reason: str,
        prompt_tokens: int,
        output_tokens: int,
        latency_s: float,
        decoding_s: float,
        spans: Sequence[Spans],
    ) -> None:
        """One choice ended; `decoding_s` is from its first token to its last."""
        self._finished[reason] += 1
        self._prompt_tokens.observe(prompt_tokens)
        self._generation_tokens.observe(output_tokens)
        self._latency.observe(latency_s)
        if output_tokens > 1:
            self._time_per_token.observe(decoding_s / (output_tokens - 1))
        if spans:
            prefill_s, decode_s = sum(s.prefill_ms for s in spans) / 1e3, sum(s.decode_ms for s in spans) / 1e3
            self._queue.observe(sum(s.queue_ms for s in spans) / 1e3)
            self._prefill.observe(prefill_s)
            self._decode.observe(decode_s)
            self._inference.observe(prefill_s + decode_s)

    def cancelled(self, prompt_tokens: int, output_tokens: int) -> None:
        """One choice was given up because the client left, or another choice failed."""
        self._finished["abort"] += 1
        self._prompt_tokens.observe(prompt_tokens)
        self._generation_tokens.observe(output_tokens)

    def failed(self, code: str) -> None:
        """One HTTP request got an error."""
        self._errors[code] += 1

    def exposition(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing is read at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        labels = {"model_name": self._model_name, "engine": "router"}
        for histogram in self._histograms:
            yield histogram.family(labels)
        yield _by_label(
            "vllm:request_success", "Choices that ended, by reason.", labels, "finished_reason", self._finished
        )
        yield _by_label("penstock:request_errors", "Requests answered with an error.", labels, "code", self._errors)
        for name, value in sorted(self._service.counters().items()):
            kind = GaugeMetricFamily if name in _SERVICE_GAUGES else CounterMetricFamily
            family = kind(f"penstock:{name}", f"Router: {name.replace('_', ' ')}.", labels=list(labels))
            family.add_metric(list(labels.values()), value)
            yield family
        loads = ((worker.worker_id, load) for worker, load in self._service.loads())
        yield from worker_metric_families(self._model_name, loads)


def _by_label(name: str, help: str, labels: dict[str, str], label: str, counts: Counter[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help, labels=[*labels, label])
    for value, count in sorted(counts.items()):
        family.add_metric([*labels.values(), value], count)
    return family


_SERVICE_GAUGES = ("in_flight", "links", "reserved_tokens")  # among RouterService.counters
