"""A trace of every request, to an OpenTelemetry collector (`--otlp-traces-endpoint`). Needs the extra `otel`.

The router makes all spans of a request when it has ended, from its timeline and from what each worker told of its part.
So workers need no exporter, and clocks of two hosts are never compared: a worker's spans have the length that it
measured, and the place that the router gives them. The caller's W3C context is the parent; what goes on to the workers,
for their logs, is the root span's.

    llm_request                     received ... finished
      tokenise, route               between the router's marks
      admission                     waiting for pages on the decode worker, from routed on
      queue, fetch, prefill         end with the first token, which the worker that computed the prompt has sampled
      transfer                      ends as long after the prompt was computed as its exposed part says
      decode                        ends with the last token
Attributes: OpenTelemetry's gen_ai.*, as vLLM has them, and penstock.* (the fields of `Spans`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, format_span_id, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from penstock.common.errors import ConfigError
from penstock.common.messages import Spans
from penstock.common.timeline import receives
from penstock.common.version import __version__
from penstock.router.choice import Choice
from penstock.router.ended import Ended
from penstock.router.front import RequestHead

HTTP_PORT = ":4318"  # OTLP's registered ports: 4317 is gRPC
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_FACTS = (
    *("worker", "cached_tokens", "computed_tokens", "transfer_bytes", "transfer_pages", "transport"),
    *("fetched_tokens", "fetch_bytes", "source"),
    *("preemptions", "local_prefill", "checksum_failures"),
)
Attributes = dict[str, str | int | float | bool]


class Part(NamedTuple):
    """A span to make: seconds on the router's monotonic clock."""

    name: str
    start: float
    end: float
    attributes: Attributes


class Tracing:
    """Begins a request's root span, and ends it with all others below it. Exports in a thread of its own."""

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        """`exporter`: in place of the one that `endpoint` asks for.

        Raises:
            ConfigError: the endpoint is none, or its protocol is not known.
        """
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "penstock")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or make_exporter(endpoint)))
        self._tracer = self._provider.get_tracer("penstock.router", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._open: dict[str, tuple[Span, int]] = {}  # by request id; `_epoch_ns` when it came

    def begin(self, head: RequestHead, received: float) -> RequestHead:
        """Open the root span of a request; the head that comes back carries its context."""
        carrier = {"traceparent": head.traceparent, "tracestate": head.tracestate}
        parent = self._propagator.extract({name: value for name, value in carrier.items() if value})
        epoch_ns = _epoch_ns()
        span = self._tracer.start_span("llm_request", parent, SpanKind.SERVER, start_time=epoch_ns + _ns(received))
        self._open[head.request_id] = span, epoch_ns
        context = span.get_span_context()
        flags = f"{int(context.trace_flags):02x}"
        ours = f"00-{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}-{flags}"
        return replace(head, traceparent=ours, tracestate=context.trace_state.to_header())

    def ended(self, request: Ended) -> None:
        """Make the other spans, and close the root span."""
        root, epoch_ns = self._open.pop(request.head.request_id)
        if root.is_recording():
            context = set_span_in_context(root)
            for part in parts(request):
                start, end = epoch_ns + _ns(part.start), epoch_ns + _ns(part.end)
                span = self._tracer.start_span(part.name, context, attributes=part.attributes, start_time=start)
                span.end(end)
            root.set_attributes(root_attributes(request))
            if request.error is not None:
                root.set_status(Status(StatusCode.ERROR, request.error.message))
        root.end(epoch_ns + _ns(request.timeline.marks["finished"]))

    def close(self) -> None:
        """Export what is left; may take as long as the exporter waits for its collector."""
        self._provider.shutdown()


def make_exporter(endpoint: str) -> SpanExporter:
    """By OTEL_EXPORTER_OTLP_TRACES_PROTOCOL; else HTTP if the endpoint looks like it, else gRPC, vLLM's default.

    Raises:
        ConfigError: the protocol is not known.
    """
    if "://" not in endpoint:
        raise ConfigError(
            f"--otlp-traces-endpoint must be a URL such as http://localhost:4318/v1/traces, got {endpoint!r}"
        )
    asked = next((value for name in _PROTOCOLS if (value := os.environ.get(name))), "")
    looks_http = endpoint.startswith("http") and (HTTP_PORT in endpoint or "/v1/traces" in endpoint)
    protocol = asked or ("http/protobuf" if looks_http else "grpc")
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

        return Http(endpoint=endpoint)
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc(endpoint=endpoint, insecure=not endpoint.startswith("https"))
    raise ConfigError(f"{_PROTOCOLS[0]} must be grpc or http/protobuf, got {protocol!r}")


def parts(request: Ended) -> Iterator[Part]:
    """Every span below the root."""
    marks = request.timeline.marks
    for name, start, end in (("tokenise", "received", "tokenised"), ("route", "tokenised", "routed")):
        if start in marks and end in marks:
            yield Part(name, marks[start], marks[end], {})
    for choice in request.choices:
        yield from _of_choice(choice, marks)


def _of_choice(choice: Choice, marks: Mapping[str, float]) -> Iterator[Part]:
    routed = marks.get("routed", marks["received"])
    computed = choice.first_at or marks["finished"]
    ended = choice.last_at or marks["finished"]
    told = choice.spans
    for span in told:
        facts = _facts(choice, span)
        received = receives(span, len(told))
        began = computed - span.prefill_ms / 1e3
        if received:
            yield Part("admission", routed, routed + span.queue_ms / 1e3, facts)
        else:
            yield Part("queue", began - span.queue_ms / 1e3, began, facts)
        if span.source:
            yield Part("fetch", began - span.fetch_ms / 1e3, began, facts)
        if span.prefill_ms and not received:
            yield Part("prefill", began, computed, facts)
        if span.transfer_pages:
            landed = computed + span.exposed_transfer_ms / 1e3
            yield Part("transfer", landed - span.transfer_ms / 1e3, landed, facts)
        if span.decode_ms:
            yield Part("decode", ended - span.decode_ms / 1e3, ended, facts)


def _facts(choice: Choice, span: Spans) -> Attributes:
    told = {f"penstock.{name}": value for name in _FACTS if (value := getattr(span, name))}
    return told | {"penstock.choice": choice.request.choice}


def root_attributes(request: Ended) -> Attributes:
    """What vLLM tells of a request, under its names (OpenTelemetry's gen_ai.*); latencies in seconds."""
    spans = [span for choice in request.choices for span in choice.spans]
    found: Attributes = {
        "gen_ai.request.id": request.head.answer_id,
        "gen_ai.response.model": request.model,
        "gen_ai.usage.prompt_tokens": request.prompt_tokens,
        "gen_ai.usage.completion_tokens": request.output_tokens,
        "gen_ai.usage.num_sequences": len(request.choices),
        "penstock.request_id": request.head.request_id,
        "penstock.outcome": request.outcome,
        "http.route": request.path,
    }
    for name, end in (("time_to_first_token", "first_token"), ("e2e", "finished")):
        seconds = request.timeline.between("received", end)
        if seconds is not None:
            found[f"gen_ai.latency.{name}"] = seconds
    if spans:
        prefill, decode = (sum(getattr(span, name) for span in spans) / 1e3 for name in ("prefill_ms", "decode_ms"))
        found["gen_ai.latency.time_in_queue"] = sum(span.queue_ms for span in spans) / 1e3
        found["gen_ai.latency.time_in_model_prefill"] = prefill
        found["gen_ai.latency.time_in_model_decode"] = decode
        found["gen_ai.latency.time_in_model_inference"] = prefill + decode
    return found | _asked(request.choices)


def _asked(choices: Sequence[Choice]) -> Attributes:
    if not choices:
        return {}
    sampling = choices[0].request.sampling
    found: Attributes = {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.n": max(choice.request.choice for choice in choices) + 1,
    }
    if sampling.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = sampling.max_tokens
    return found


def _epoch_ns() -> int:
    """What makes a time of the monotonic clock one since the epoch. One for a whole request: two differ by a little,
    and a span of no length would end before it begins."""
    return time.time_ns() - time.monotonic_ns()


def _ns(monotonic: float) -> int:
    return round(monotonic * 1e9)
