"""Figures of several router processes in one answer: told apart, and each worker's once."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import httpx
import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.testclient import TestClient

from penstock.common.config import RouterConfig
from penstock.common.errors import ConfigError
from penstock.private_redis import free_port
from penstock.router.app import create_app
from penstock.router.group import Group, merged
from penstock.router.server import RouterServer
from tests.router.fake_router import NO_REDIS, FakeService
from tests.tiny_tokenizers import byte_level


def families(answered: float, running: float) -> list[Metric]:
    counter = CounterMetricFamily("penstock:requests", "Requests.", labels=["engine"])
    counter.add_metric(["router"], answered)
    counter.add_metric(["decode-0"], 99.0)
    gauge = GaugeMetricFamily("vllm:num_requests_running", "Running.", labels=["engine"])
    gauge.add_metric(["decode-0"], running)
    return [counter, gauge]


def test_routers_are_told_apart_and_a_worker_is_there_once() -> None:
    counter, gauge = merged({1: families(5, 7), 0: families(3, 8)}, here=1)
    found = {tuple(sorted(sample.labels.items())): sample.value for sample in counter.samples}
    assert found == {
        (("engine", "router"), ("process", "0")): 3.0,
        (("engine", "router"), ("process", "1")): 5.0,
        (("engine", "decode-0"),): 99.0,
    }
    assert [(sample.labels, sample.value) for sample in gauge.samples] == [({"engine": "decode-0"}, 7.0)]
    assert (counter.type, counter.documentation) == ("counter", "Requests.")


@pytest.mark.parametrize(
    ("ports", "port", "for_all"), [((), 8000, False), (("9000", "9001"), 8000, True), (("9000", "9001"), 9001, False)]
)
def test_which_questions_are_for_all(ports: tuple[str, ...], port: int, for_all: bool) -> None:
    group = Group(RouterConfig(admin_port=9001 if ports else 0, group_ports=ports))
    assert group.is_for_all({"server": ("127.0.0.1", port)}) is for_all
    assert group.index == (1 if ports else 0)


def test_a_shared_port_that_is_taken_is_said_and_nothing_is_left_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, admin = taken.getsockname()[1], free_port("127.0.0.1")
        config = RouterConfig(port=port, admin_port=admin, group_ports=(str(admin), "1"), redis_url=NO_REDIS)
        service: Any = FakeService()
        server = RouterServer(create_app(service, config, byte_level()), service, config)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}"):
            server.run()
    assert (service.started, service.stopped) == (1, 1)
    socket.create_server(("127.0.0.1", admin)).close()


def test_a_process_takes_no_connections_before_it_knows_its_workers() -> None:
    """The launcher asks at the admin port, and says that all are ready."""
    port, admin = free_port("127.0.0.1"), free_port("127.0.0.1")
    config = RouterConfig(port=port, admin_port=admin, group_ports=(str(admin), "1"), redis_url=NO_REDIS)
    service: Any = FakeService()
    service.is_ready = False
    server = RouterServer(create_app(service, config, byte_level()), service, config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        early = _health(admin)
        assert early.status_code == 503 and "no decode worker" in early.text
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        service.is_ready = True
        deadline = time.monotonic() + 60
        while _health(admin).status_code != 200:
            assert time.monotonic() < deadline
        socket.create_connection(("127.0.0.1", port)).close()
    finally:
        server.should_exit = True
        thread.join()


def test_a_process_is_not_well_before_its_shared_port_is_open() -> None:
    config = RouterConfig(port=2, admin_port=1, group_ports=("1", "2"), redis_url=NO_REDIS)
    application = create_app(FakeService(), config, byte_level())  # type: ignore[arg-type]
    client = TestClient(application)
    answer = client.get("/health")
    assert answer.status_code == 503 and "port is not open" in answer.text
    application.state.takes_connections = True  # server.py's part
    assert client.get("/health").status_code == 200


def _health(port: int) -> httpx.Response:
    """As soon as somebody answers there."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
