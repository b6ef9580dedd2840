"""Figures of several router processes in one answer: told apart, and each worker's once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from penstock.common.config import RouterConfig
from penstock.common.errors import ConfigError
from penstock.private_redis import free_port
from penstock.router import exposition, http_protocol
from penstock.router.app import create_app
from penstock.router.exposition import together
from penstock.router.group import Group
from penstock.router.server import RouterServer
from tests.router.fake_router import NO_REDIS, FakeService
from tests.tiny_tokenizers import byte_level

SHARED_PORT = 8000


def test_samples_of_a_family_stand_together_under_one_head() -> None:
    a, b = '# HELP a An "a".\n# TYPE a gauge\n', "# HELP b_total B.\n# TYPE b_total counter\n"
    c = "# HELP c C.\n# TYPE c histogram\n"
    first = a + 'a{path="\\n# HELP x"} 1.0\na{path="y"} 2.0\n' + b
    second = b + "b_total 3.0\n" + c + 'c_bucket{le="+Inf"} 4.0\n' + a + "a 5.0\n"
    assert together(text.encode() for text in (first, second, "")).decode() == (
        a
        + 'a{path="\\n# HELP x"} 1.0\na{path="y"} 2.0\na 5.0\n'
        + b
        + "b_total 3.0\n"
        + c
        + 'c_bucket{le="+Inf"} 4.0\n'
    )


class Writings:
    """How often the families of all workers were made, and whether that or a text held up an event loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_workers = self.on_a_loop = 0
        for name in ("worker_metric_families", "generate_latest"):
            monkeypatch.setattr(exposition, name, self._noting(name, getattr(exposition, name)))

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            self.of_workers += name == "worker_metric_families"
            with contextlib.suppress(RuntimeError):  # there is none in this thread
                asyncio.get_running_loop()
                self.on_a_loop += 1
            return function(*args)

        return noting


@contextlib.contextmanager
def two_processes() -> Iterator[tuple[Starlette, Starlette, int]]:
    """The first, not served; the second, and its admin port."""
    admin = free_port("127.0.0.1")
    ports, other_port = ("1", str(admin)), free_port("127.0.0.1")
    configs = [
        RouterConfig(port=port, admin_port=int(own), group_ports=ports, redis_url=NO_REDIS, served_model_name=("m",))
        for port, own in zip((SHARED_PORT, other_port), ports, strict=True)
    ]
    services: list[Any] = [FakeService(), FakeService()]
    [(info, load)] = services[1].loads()
    services[1].loads = lambda: [(info, msgspec.structs.replace(load, running=9))]  # its last heartbeat is another
    apps = [create_app(service, config, byte_level()) for service, config in zip(services, configs, strict=True)]
    server = RouterServer(apps[1], services[1], configs[1])
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        _health(admin)
        yield apps[0], apps[1], admin
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def silent_clients(port: int, count: int) -> Iterator[None]:
    """So many connections without a request."""
    with contextlib.ExitStack() as clients:
        for _ in range(count):
            clients.enter_context(socket.create_connection(("127.0.0.1", port)))
        yield


def scraped(app: Starlette) -> str:
    """What the process of `app` answers at the shared port."""

    async def get() -> httpx.Response:
        url = f"http://127.0.0.1:{SHARED_PORT}"
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=url) as client:
            return await client.get("/metrics")

    answer = asyncio.run(get())
    assert answer.status_code == 200
    return answer.text


def samples(text: str, name: str) -> list[tuple[str, str, float]]:
    """Engine, process and value of each."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a family is there twice"
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return [(one.labels.get("engine", ""), one.labels.get("process", ""), one.value) for one in found]


def test_any_process_tells_of_all_and_each_worker_once(monkeypatch: pytest.MonkeyPatch) -> None:
    writings = Writings(monkeypatch)
    with two_processes() as (one, other, admin):
        for number, app in enumerate((one, other), start=1):
            for _ in range(number):
                app.state.metrics.failed("overloaded")
        text = scraped(one)
        assert samples(text, "penstock:request_errors_total") == [("router", "0", 1.0), ("router", "1", 2.0)]
        assert samples(text, "vllm:num_requests_running") == [("decode-0", "", 3.0)], "as the asked one knows it"
        assert samples(text, "penstock:worker_usable") == [("decode-0", "", 0.0)]
        python = samples(text, "python_info")
        assert [process for _, process, _ in python] == ["0", "1"]
        assert writings.of_workers == 1, "nobody else speaks of the workers"
        alone = httpx.get(f"http://127.0.0.1:{admin}/metrics", timeout=60).text
        assert samples(alone, "penstock:request_errors_total") == [("router", "", 2.0)]
        assert samples(alone, "vllm:num_requests_running") == [("decode-0", "", 9.0)]
    assert samples(scraped(one), "penstock:request_errors_total") == [("router", "0", 1.0)], "the other one is gone"
    assert not writings.on_a_loop, "all streams would wait"


def test_a_process_that_takes_no_more_clients_still_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "most_clients", lambda: 64)
    with two_processes() as (one, _, admin), silent_clients(admin, 65):
        told = samples(scraped(one), "python_info")
        assert [process for _, process, _ in told] == ["0", "1"]
        assert httpx.get(f"http://127.0.0.1:{admin}/health", timeout=60).status_code == 200
        refused = httpx.get(f"http://127.0.0.1:{admin}/v1/models", timeout=60)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")


@pytest.mark.parametrize(
    ("ports", "port", "for_all"), [((), 8000, False), (("9000", "9001"), 8000, True), (("9000", "9001"), 9001, False)]
)
def test_which_questions_are_for_all(ports: tuple[str, ...], port: int, for_all: bool) -> None:
    group = Group(RouterConfig(admin_port=9001 if ports else 0, group_ports=ports))
    assert group.is_for_all({"server": ("127.0.0.1", port)}) is for_all
    assert group.index == (1 if ports else 0)


@pytest.mark.parametrize("alone", [False, True])
def test_a_port_that_is_taken_is_said_and_nothing_is_left_open(alone: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, admin = taken.getsockname()[1], free_port("127.0.0.1")
        shared: dict[str, Any] = {} if alone else {"admin_port": admin, "group_ports": (str(admin), "1")}
        config = RouterConfig(port=port, redis_url=NO_REDIS, **shared)
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
