"""The store of responses on a real Redis: against a plain list that forgets the oldest; lifetimes; what others wish."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.common.config import RouterConfig
from penstock.common.errors import Unavailable
from penstock.router.responses.store import ResponseStore, Stored
from tests.conftest import RedisServer

MAX_BYTES = 1 << 20
KIB = 1 << 10
NAMES = itertools.count()
_steps = st.tuples(st.sampled_from(["keep", "get", "delete"]), st.sampled_from("abcde"), st.integers(0, 1200))


@contextlib.asynccontextmanager
async def opened(redis: RedisServer, namespace: str = "", **options: Any) -> AsyncIterator[ResponseStore]:
    namespace = namespace or f"store-{next(NAMES)}"
    given = {"response_store_mib": 1, "response_ttl_s": 600.0, **options}
    store = ResponseStore(RouterConfig(model="m", redis_url=redis.url, namespace=namespace, **given))
    try:
        yield store
    finally:
        await store.close()


def test_an_order_that_the_server_has_evicted_is_begun_anew(redis_server: RedisServer) -> None:
    async def check() -> None:
        async with opened(redis_server, namespace="evicted") as store:
            await store.keep(("", "old"), Stored(b"b" * 900 * KIB, ()))
            with redis.Redis.from_url(redis_server.url) as client:
                client.delete("evicted:responses")
            for name in ("one", "two", "three"):
                await store.keep(("", name), Stored(b"b" * 300 * KIB, ()))
            assert all([await store.get(("", name)) for name in ("one", "two", "three")])

    asyncio.run(check())


async def until(ask: Callable[[], Awaitable[Any]], wanted: object) -> None:
    deadline = time.monotonic() + 60
    while (found := await ask()) != wanted:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.005)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(_steps, max_size=30))
def test_the_oldest_go_first(redis_server: RedisServer, steps: list[tuple[str, str, int]]) -> None:
    async def check() -> None:
        async with opened(redis_server) as store:
            model: list[tuple[str, int]] = []  # id, size; the oldest first
            for action, name, size_kib in steps:
                size = size_kib * KIB
                if action == "keep":
                    turn = b"t" * (size // 2)
                    wrapped = size - len(turn) - 16  # what the turns are written in counts, too
                    await store.keep(("", name), Stored(b"b" * max(0, wrapped), (turn,)))
                    model = [entry for entry in model if entry[0] != name]
                    if size <= MAX_BYTES:
                        model.append((name, size))
                    while sum(entry[1] for entry in model) > MAX_BYTES:
                        model.pop(0)
                elif action == "get":
                    known = any(entry[0] == name for entry in model)
                    assert (await store.get(("", name)) is not None) == known
                    assert await store.get(("another", name)) is None
                else:
                    known = any(entry[0] == name for entry in model)
                    assert await store.wish(("another", name), "delete") == "unknown"
                    assert await store.wish(("", name), "delete") == ("over" if known else "unknown")
                    model = [entry for entry in model if entry[0] != name]
            client, ns = store._redis.client, store._namespace
            assert [i.decode() for i in await client.zrange(f"{ns}:responses", 0, -1)] == [i for i, _ in model]
            total = int(await client.hget(f"{ns}:response-sizes", "") or 0)
            assert 0 <= total <= MAX_BYTES
            bodies = {f"{ns}:response:{name}" for name, _ in model}
            indexes = {f"{ns}:responses", f"{ns}:response-sizes"} if model else {f"{ns}:response-sizes"}
            assert {key.decode() async for key in client.scan_iter(f"{ns}:*")} - indexes == bodies

    asyncio.run(check())


@pytest.mark.asyncio
async def test_nothing_outlives_its_time(redis_server: RedisServer) -> None:
    async with opened(redis_server, response_ttl_s=0.02) as store:
        await store.keep(("", "a"), Stored(b"body", streamed=True), [b"event"])
        await until(lambda: store.get(("", "a")), None)
        await store.keep(("", "b"), Stored(b"body"))  # takes what is over out of the total
        assert await store._redis.client.zrange(f"{store._namespace}:responses", 0, -1) == [b"b"]
        await until(lambda: store._redis.client.keys(f"{store._namespace}:*"), [])


@pytest.mark.asyncio
async def test_who_makes_one_hears_what_is_wished_of_it(redis_server: RedisServer) -> None:
    async with opened(redis_server) as maker, opened(redis_server, maker._namespace) as other:
        key = "key-0", "a"
        assert await other.wish(key, "cancel") == "unknown"
        await maker.begin(key, Stored(b"queued", streamed=True))
        assert await other.get(key) == Stored(b"queued", (), True, True)
        assert await maker.tend("a", b"going", 0, [b"0", b"1"]) is None
        assert (await other.get(key), await other.events("a", 0)) == (Stored(b"going", (), True, True), [b"1"])
        assert await other.wish(key, "cancel") == "told"
        assert await maker.tend("a", b"going", 2, [b"2"]) == "cancel"
        await maker.keep(key, Stored(b"over", (b"t",), True), [b"0", b"1", b"2", b"3"])
        assert await other.get(key) == Stored(b"over", (b"t",), True, False)
        assert await other.events("a", -1) == [b"0", b"1", b"2", b"3"]
        await maker.begin(("", "b"), Stored(b"queued"))
        assert await other.wish(("", "b"), "delete") == "told"
        assert await other.get(("", "b")) is None and await other.wish(("", "b"), "delete") == "unknown"
        assert await maker.tend("b", b"going", 0, []) == "delete"
        await maker.keep(("", "b"), Stored(b"over"))
        assert await other.get(("", "b")) is None and await maker.tend("b", b"", 0, []) is None


@pytest.mark.asyncio
async def test_what_is_said_late_changes_nothing_that_is_over(redis_server: RedisServer) -> None:
    async with opened(redis_server) as store:
        key = "", "a"
        await store.begin(key, Stored(b"queued", streamed=True))
        await store.keep(key, Stored(b"over", streamed=True), [b"0", b"1"])
        assert await store.tend("a", b"going", 0, [b"0"]) is None  # overtaken on its way
        assert await store.get(key) == Stored(b"over", streamed=True)
        assert await store.events("a", -1) == [b"0", b"1"]


@pytest.mark.asyncio
async def test_events_that_are_told_twice_are_there_once(redis_server: RedisServer) -> None:
    async with opened(redis_server) as store:
        await store.begin(("", "a"), Stored(b"queued", streamed=True))
        for first, events in ((0, [b"0", b"1"]), (0, [b"0", b"1", b"2"]), (3, [b"3"]), (2, [b"2", b"3"])):
            assert await store.tend("a", b"going", first, events) is None
        assert await store.events("a", -1) == [b"0", b"1", b"2", b"3"]


@pytest.mark.asyncio
async def test_a_maker_that_dies_is_noticed(redis_server: RedisServer) -> None:
    async with opened(redis_server, lease_s=0.05) as store:
        await store.begin(("", "a"), Stored(b"queued"))
        await until(lambda: store.get(("", "a")), Stored(b"queued"))


@pytest.mark.asyncio
async def test_redis_is_away(own_redis: RedisServer) -> None:
    own_redis.stop()
    async with opened(own_redis) as store:
        await store.keep(("", "a"), Stored(b"body"))  # the answer is given all the same
        for asked in (
            store.get(("", "a")),
            store.wish(("", "a"), "cancel"),
            store.begin(("", "a"), Stored(b"")),
            store.tend("a", b"body", 0, []),
        ):
            with pytest.raises(Unavailable, match="Redis"):
                await asked
