"""The status server, asked over real HTTP; the Prometheus text is read back by prometheus_client's parser."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.common.errors import ConfigError
from penstock.common.histogram import STEP_TOKENS, Histogram
from penstock.common.messages import MeasuredRates, WorkerInfo, WorkerLoad
from penstock.common.status_server import StatusServer
from penstock.common.worker_metrics import worker_metric_families
from tests.worker_info import worker_info

LOAD = WorkerLoad(
    running=3, waiting=2, num_pages=100, free_pages=75, prompt_tokens=11, transfer_bytes=4096, draining=True
)


def worker(worker_id: str) -> WorkerInfo:
    return worker_info(worker_id, served_models=["tiny"], page_size=16, page_bytes=4096, max_model_len=512)


@contextmanager
def serving(
    health: Callable[[], tuple[bool, str]] = lambda: (True, "ready"),
    snapshot: Callable[[], dict[str, object]] = lambda: {"pages": {"held": 25}},
) -> Iterator[StatusServer]:
    server = StatusServer("127.0.0.1", 0, health=health, snapshot=snapshot, load=lambda: LOAD, info=worker("decode-0"))
    try:
        yield server
    finally:
        server.close()


def get(server: StatusServer, path: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_health_follows_the_worker() -> None:
    states = iter([(True, "ready"), (False, "draining")])
    with serving(health=lambda: next(states)) as server:
        assert get(server, "/health") == (200, '{"healthy": true, "message": "ready"}')
        assert get(server, "/health") == (503, '{"healthy": false, "message": "draining"}')


def test_ledger_is_json() -> None:
    with serving() as server:
        status, body = get(server, "/debug/ledger?pretty=1")
        assert (status, json.loads(body)) == (200, {"pages": {"held": 25}})


def test_engine_that_does_not_answer_is_a_503() -> None:
    def late() -> dict[str, object]:
        raise TimeoutError("no answer from the engine within 2 s")

    with serving(snapshot=late) as server:
        status, body = get(server, "/debug/ledger")
        assert status == 503
        assert "within 2 s" in body


def test_failing_callable_is_logged_and_does_not_stop_the_server(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("ledger is broken")

    with caplog.at_level(logging.ERROR), serving(snapshot=broken) as server:
        with pytest.raises(ConnectionError):
            get(server, "/debug/ledger")
        assert get(server, "/health")[0] == 200
    assert "ledger is broken" in caplog.text


def test_unknown_page_names_the_known_ones() -> None:
    with serving() as server:
        status, body = get(server, "/nothing")
        assert status == 404
        assert "/debug/ledger" in body


def test_metrics_carry_vllm_names_and_labels() -> None:
    with serving() as server:
        status, text = get(server, "/metrics")
    samples = {
        sample.name: (sample.value, sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    labels = {"model_name": "tiny", "engine": "decode-0"}
    assert status == 200
    assert samples["vllm:num_requests_running"] == (3, labels)
    assert samples["vllm:num_requests_waiting"] == (2, labels)
    assert samples["vllm:kv_cache_usage_perc"] == (0.25, labels)
    assert samples["vllm:prompt_tokens_total"] == (11, labels)
    assert samples["penstock:kv_transfer_bytes_total"] == (4096, labels)
    assert samples["penstock:draining"] == (1, labels)


def test_every_field_of_the_load_reaches_a_metric() -> None:
    def values(load: WorkerLoad) -> list[float]:
        families = worker_metric_families("tiny", [(worker("decode-0"), load)])
        return [sample.value for family in families for sample in family.samples]

    def changes(base: WorkerLoad, name: str) -> list[WorkerLoad]:
        old = getattr(base, name)
        if isinstance(old, MeasuredRates):
            one = [msgspec.structs.replace(old, **{f.name: 1.0}) for f in msgspec.structs.fields(MeasuredRates)]
            return [msgspec.structs.replace(base, **{name: rates}) for rates in one]
        return [msgspec.structs.replace(base, **{name: not old if isinstance(old, bool) else old + 1})]

    base = WorkerLoad(num_pages=10, free_pages=5)
    for name in (field.name for field in msgspec.structs.fields(WorkerLoad)):
        if isinstance(getattr(base, name), dict):
            continue  # of histograms: the next test
        for changed in changes(base, name):
            assert values(changed) != values(base), f"{name} is shown by no metric"


def test_histograms_of_the_load_are_shown_cumulative() -> None:
    steps = Histogram(STEP_TOKENS)
    for tokens in (1, 5, 8, 20000):
        steps.observe(tokens)
    shown = worker_metric_families("tiny", [(worker("d"), WorkerLoad(histograms={"step_tokens": steps.packed()}))])
    family = next(family for family in shown if family.name == "vllm:iteration_tokens_total")
    samples = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert (samples["1.0"], samples["8.0"], samples["16384.0"], samples["+Inf"]) == (1, 3, 3, 4)
    assert samples["vllm:iteration_tokens_total_sum"] == 1 + 5 + 8 + 20000


def test_histograms_of_other_bounds_are_not_misread() -> None:
    assert Histogram.unpacked((1, 2), [1, 2, 3, 4, 5]).counts == [0, 0, 0]
    counted = Histogram.unpacked((1, 2), [1, 2, 3, 9.5])
    assert (counted.counts, counted.total) == ([1, 2, 3], 9.5)


def test_one_sample_for_each_worker() -> None:
    families = worker_metric_families(
        "tiny", [(worker("prefill-0"), WorkerLoad(running=1)), (worker("decode-0"), WorkerLoad(running=2))]
    )
    running = next(family for family in families if family.name == "vllm:num_requests_running")
    assert [(s.labels["engine"], s.value) for s in running.samples] == [("prefill-0", 1), ("decode-0", 2)]


def test_metrics_of_a_worker_without_pages() -> None:
    families = worker_metric_families("tiny", [(worker("decode-0"), WorkerLoad())])
    usage = next(family for family in families if family.name == "vllm:kv_cache_usage_perc")
    assert usage.samples[0].value == 0.0


def test_close_frees_the_port() -> None:
    with serving() as server:
        port = server.port
        assert server.url == f"http://127.0.0.1:{port}"
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_in_use_is_a_mistake_of_the_set_up() -> None:
    with serving() as server, pytest.raises(ConfigError, match=rf"status pages to 127\.0\.0\.1:{server.port}: Address"):
        StatusServer(
            "127.0.0.1",
            server.port,
            health=lambda: (True, ""),
            snapshot=dict,
            load=lambda: LOAD,
            info=worker("decode-0"),
        )
