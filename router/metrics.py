"""Prometheus metrics of a router and of the workers it sees, under vLLM's names where they mean the same.

Router figures (engine="router") are kept in plain Python, so that a token costs one bisect; worker figures
(engine=<worker id>) are those of their last heartbeat. One `RouterMetrics` per app; exposition.py makes /metrics of it.
What is counted in finer steps than vLLM's has vLLM's own buckets under vLLM's name, and all under `penstock:`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from penstock.common.histogram import Histogram
from penstock.common.messages import Spans
from penstock.common.worker_metrics import LABELS, histogram_family
from penstock.router.absent_metrics import absent_families
from penstock.router.exposition import Scrape
from penstock.router.http_metrics import HttpMetrics

if TYPE_CHECKING:
    from penstock.router.service import RouterService

# vLLM's upper bounds, and what is counted below them. Source: vLLM 0.22.1, v1/metrics/loggers.py.
TO_FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
PER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
PER_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKENS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))  # shown up to the context
CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
FINE_PER_TOKEN = (0.001, 0.0025, 0.005)
FINE_PER_REQUEST = (0.001, 0.003, 0.01, 0.03, 0.1)
MOVING = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
MOVED_BYTES = tuple(float(4**power) for power in range(6, 19))  # 4 KiB to 64 GiB

_REASONS = ("stop", "length", "abort", "error")
_GAUGES = ("in_flight", "queued", "links", "reserved_tokens", "redis_up")  # among RouterService.counters


class RouterMetrics:
    """What the router measures."""

    def __init__(self, service: RouterService, model_name: str) -> None:
        self._service = service
        self._labels = {"model_name": model_name, "engine": "router"}
        self._finished = Counter(dict.fromkeys(_REASONS, 0))
        self._errors: Counter[str] = Counter()
        self.connections_cut = Counter(unread=0, unfinished=0)  # by what stood still: their answers, their requests
        self._rows: list[tuple[str, str, Histogram, Sequence[float]]] = []  # name, help, counted, vLLM's bounds
        new = self._new
        self.time_to_first_token = new("time_to_first_token_seconds", "Received until the first token.", TO_FIRST)
        self.inter_token_latency = new(
            "inter_token_latency_seconds", "Between two token messages.", PER_TOKEN, FINE_PER_TOKEN
        )
        self._time_per_token = new(
            "request_time_per_output_token_seconds",
            "Mean time of a request's tokens after the first.",
            PER_TOKEN,
            FINE_PER_TOKEN,
        )
        fine = FINE_PER_REQUEST
        self._latency = new("e2e_request_latency_seconds", "Received until finished.", PER_REQUEST, fine)
        self._queue = new("request_queue_time_seconds", "Waiting at workers.", PER_REQUEST, fine)
        self._inference = new("request_inference_time_seconds", "Prefill and decode.", PER_REQUEST, fine)
        self._prefill = new("request_prefill_time_seconds", "Computing the prompt.", PER_REQUEST, fine)
        self._decode = new("request_decode_time_seconds", "Decoding.", PER_REQUEST, fine)
        self._prompt_tokens = new("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._generation_tokens = new("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._longest = new("request_max_num_generation_tokens", "Tokens of a prompt's longest answer.", TOKENS)
        self._max_tokens = new("request_params_max_tokens", "max_tokens asked for.", TOKENS)
        self._computed = new("request_prefill_kv_computed_tokens", "Prompt tokens that were computed.", TOKENS)
        self._n = new("request_params_n", "n asked for.", CHOICES)
        self._transports: dict[str, tuple[Histogram, Histogram, Histogram]] = {}  # seconds, exposed seconds, bytes
        self.http = HttpMetrics()

    def _new(self, name: str, help: str, bounds: Sequence[float], finer: Sequence[float] = ()) -> Histogram:
        histogram = Histogram((*finer, *bounds))
        self._rows.append((name, help, histogram, bounds))
        return histogram

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
            self._computed.observe(sum(s.computed_tokens for s in spans))
        for span in spans:
            if span.transport and not span.source:  # else a prefix was fetched over it
                self._handed_off(span)

    def _handed_off(self, span: Spans) -> None:
        """A choice's prompt was handed off."""
        histograms = self._transports.get(span.transport)
        if histograms is None:
            histograms = Histogram(MOVING), Histogram(MOVING), Histogram(MOVED_BYTES)
            self._transports[span.transport] = histograms
        seconds, exposed, size = histograms
        seconds.observe(span.transfer_ms / 1e3)
        exposed.observe(span.exposed_transfer_ms / 1e3)
        size.observe(span.transfer_bytes)

    def answered(self, longest: Iterable[int]) -> None:
        """One HTTP request was answered whole: for each of its prompts, the tokens of the longest choice."""
        for tokens in longest:
            self._longest.observe(tokens)

    def cancelled(self, prompt_tokens: int, output_tokens: int, reason: str = "abort") -> None:
        """One choice was given up: the client left or another choice failed (abort), or it failed itself (error)."""
        self._finished[reason] += 1
        self._prompt_tokens.observe(prompt_tokens)
        self._generation_tokens.observe(output_tokens)

    def failed(self, code: str) -> None:
        """One HTTP request got an error."""
        self._errors[code] += 1

    def scrape(self) -> Scrape:
        """All that there is to show, as of now; about 1 ms, however many workers there are."""
        service = self._service
        counted = [*self.collect(), *self.http.collect()]
        return Scrape(counted, self._labels["model_name"], service.loads(), service.states())

    def collect(self) -> Iterator[Metric]:
        """What is counted here, and not by `http`."""
        labels = self._labels
        model = self._service.model_info()
        context = TOKENS[-1] if model is None else model.max_model_len
        for name, help, histogram, bounds in self._rows:
            rows = [(labels, histogram)]
            shown = [bound for bound in bounds if bounds is not TOKENS or bound <= context]
            yield histogram_family(f"vllm:{name}", help, rows, LABELS, shown)
            if len(bounds) < len(histogram.bounds):
                yield histogram_family(f"penstock:{name}", help + " In finer steps.", rows, LABELS)
        yield from self._handoffs()
        yield _by_label(
            "vllm:request_success", "Choices that ended, by reason.", labels, "finished_reason", self._finished
        )
        yield _by_label("penstock:request_errors", "Requests answered with an error.", labels, "code", self._errors)
        yield _by_label("penstock:connections_cut", "Connections cut.", labels, "reason", self.connections_cut)
        for name, value in sorted(self._service.counters().items()):
            kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            family = kind(f"penstock:{name}", f"Router: {name.replace('_', ' ')}.", labels=LABELS)
            family.add_metric(list(labels.values()), value)
            yield family
        for name, histogram in self._service.histograms().items():
            help = f"Router: {name.replace('_', ' ')}."
            yield histogram_family(f"penstock:{name}", help, [(labels, histogram)], LABELS)
        yield from absent_families(labels)

    def _handoffs(self) -> Iterator[Metric]:
        texts = (
            ("penstock:handoff_seconds", "First ticket until the last page had landed."),
            ("penstock:handoff_exposed_seconds", "Prompt computed until the last page had landed."),
            ("penstock:handoff_bytes", "Bytes of a prompt's pages."),
        )
        for place, (name, help) in enumerate(texts):
            rows = [
                (self._labels | {"transport": transport}, histograms[place])
                for transport, histograms in sorted(self._transports.items())
            ]
            yield histogram_family(name, help, rows, (*LABELS, "transport"))


def _by_label(name: str, help: str, labels: dict[str, str], label: str, counts: Counter[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help, labels=[*labels, label])
    for value, count in sorted(counts.items()):
        family.add_metric([*labels.values(), value], count)
    return family
