"""One running router for all tests of this folder that do not need a special one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import RedisServer
from tests.router.fake_router import Router, running


@pytest.fixture(scope="session")
def _shared_router(_shared_redis: RedisServer) -> Iterator[Router]:
    with running(redis_url=_shared_redis.url) as router:
        yield router


@pytest.fixture
def router(_shared_router: Router) -> Router:
    """A router whose fake worker says `ANSWER`, one token a message."""
    _shared_router.reset()
    return _shared_router
