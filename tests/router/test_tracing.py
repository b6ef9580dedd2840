"""Exporters by endpoint and environment; one trace over gRPC, vLLM's default, to a real server."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

from penstock.common.errors import ConfigError, Overloaded
from penstock.common.timeline import Timeline
from penstock.router.ended import Ended
from penstock.router.front import RequestHead
from penstock.router.tracing import Tracing, make_exporter
from tests.router.fake_router import running
from tests.system.otlp_receiver import grpc_collector, http_collector

HEAD = RequestHead(answer_id="a", request_id="r", timeline=False)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("endpoint", "protocol", "kind"),
    [
        ("http://localhost:4318/v1/traces", "", Http),
        ("http://localhost:4318", "", Http),
        ("http://collector/v1/traces", "", Http),
        ("http://localhost:4317", "", Grpc),
        ("grpc://localhost:4317", "", Grpc),
        ("http://localhost:4317", "http/protobuf", Http),
        ("http://localhost:4318/v1/traces", "grpc", Grpc),
    ],
)
def test_the_exporter_is_the_one_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, protocol: str, kind: type
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    exporter = make_exporter(endpoint)
    try:
        assert isinstance(exporter, kind)
    finally:
        exporter.shutdown()


def test_wrong_endpoints_and_protocols_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint must be a URL"):
        make_exporter("localhost:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")
    with pytest.raises(ConfigError, match="'http/json'"):
        make_exporter("http://localhost:4318")


def test_a_trace_over_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-fleet")
    with grpc_collector() as collector:
        tracing = Tracing(collector.endpoint)
        timeline = Timeline()
        timeline.mark("received", time.monotonic())
        head = tracing.begin(HEAD, timeline.marks["received"])
        assert head.traceparent.startswith("00-") and int(head.traceparent[-2:], 16) & 1
        tracing.ended(Ended.of(head, "/v1/completions", "tiny", timeline, None, Overloaded("full")))
        tracing.close()
        [span] = collector.spans
    assert span.name == "llm_request" and span.status.message == "full"
    assert span.trace_id.hex() == head.traceparent.split("-")[1]
    assert collector.resources[0]["service.name"] == "my-fleet"


def test_what_the_caller_does_not_sample_is_not_exported() -> None:
    with grpc_collector() as collector:
        tracing = Tracing(collector.endpoint)
        timeline = Timeline()
        timeline.mark("received", time.monotonic())
        unsampled = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
        head = tracing.begin(RequestHead(answer_id="a", request_id="r", timeline=False, traceparent=unsampled), 0.0)
        assert head.traceparent.startswith(unsampled[:36]) and not int(head.traceparent[-2:], 16) & 1
        tracing.ended(Ended.of(head, "/v1/completions", "tiny", timeline, None, None))
        tracing.close()
        assert collector.spans == []


def test_choices_have_spans_of_their_own_and_nothing_is_lost_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    late = itertools.count(time.time_ns(), -1_000_000)  # the wall clock is put back, again and again
    clock = SimpleNamespace(time_ns=lambda: next(late), monotonic=time.monotonic, monotonic_ns=time.monotonic_ns)
    monkeypatch.setattr("penstock.router.tracing.time", clock)
    with http_collector() as collector:
        with running(otlp_traces_endpoint=collector.endpoint) as router:
            router.openai.completions.create(model="tiny", prompt="a", n=2)
            context = router.last.traceparent
        spans = collector.spans  # the router's end has exported them
    assert {span.trace_id.hex() for span in spans} == {context.split("-")[1]}
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in spans)
    names = sorted(span.name for span in spans)
    assert names == ["admission"] * 2 + ["decode"] * 2 + ["llm_request", "route", "tokenise"] + ["transfer"] * 2
