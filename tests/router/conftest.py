"""One running router for all tests of this folder that do not need a special one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import RedisServer
from tests.router.fake_router import Router, running
from tests.router.fake_worker import FakeWorker


@pytest.fixture(scope="session")
def _shared_router(_shared_redis: RedisServer) -> Iterator[Router]:
    with running(redis_url=_shared_redis.url) as router:
        yield router


@pytest.fixture
def router(_shared_router: Router) -> Router:
    """A router whose fake worker says `ANSWER`, one token a message."""
    _shared_router.reset()
    return _shared_router


@pytest.fixture
def start_worker(redis_server: Any) -> Iterator[Callable[..., Any]]:
    started: list[Any] = []
    before = set(threading.enumerate())  # those of a fleet that other tests share are no concern of these

    def start(worker_id: str, role: str = "decode", url: str = "", **options: Any) -> Any:
        started.append(FakeWorker(url or redis_server.url, worker_id, role, **options))
        return started[-1]

    yield start
    for worker in started:
        worker.close()
    left = set(threading.enumerate()) - before
    assert not [t for t in left if t.name == "registry" or t.name.startswith(("d", "p"))]
