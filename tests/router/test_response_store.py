"""The store of responses on a real Redis: against a plain model of what has to go; lifetimes; what others wish."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.common.config import RouterConfig
from penstock.common.errors import Unavailable
from penstock.router.responses.store import ResponseKey, ResponseStore, Stored
from tests.conftest import RedisServer

MAX_BYTES = 1 << 20
KIB = 1 << 10
NAMES = itertools.count()
Step = tuple[str, ResponseKey, int]
_keys = st.tuples(st.sampled_from(["", "key-0", "a:b"]), st.sampled_from("abcd"))
_steps = st.tuples(st.sampled_from(["keep", "keep", "get", "delete"]), _keys, st.integers(1, 1200))


@contextlib.asynccontextmanager
async def opened(redis: RedisServer, namespace: str = "", **options: Any) -> AsyncIterator[ResponseStore]:
    namespace = namespace or f"store-{next(NAMES)}"
    given = {"response_store_mib": 1, "response_ttl_s": 600.0, **options}
    store = ResponseStore(RouterConfig(model="m", redis_url=redis.url, namespace=namespace, **given))
    try:
        yield store
    finally:
        await store.close()


def of_size(size: int) -> Stored:
    turn = b"t" * (size // 2)
    wrapped = len(msgspec.msgpack.encode([turn]))  # what the turns are written in counts, too
    return Stored(b"b" * (size - wrapped), (turn,))


def held(sizes: Mapping[ResponseKey, int]) -> dict[str, int]:
    """What each tenant holds, in bytes."""
    total: dict[str, int] = {}
    for (tenant, _), size in sizes.items():
        total[tenant] = total.get(tenant, 0) + size
    return total


def make_room(model: dict[ResponseKey, int], key: ResponseKey, size: int) -> None:
    """The rule, said plainly: `key` is the newest, then whoever holds most gives up its oldest until all fit."""
    model[key] = size
    while sum(model.values()) > MAX_BYTES:
        largest = max(held(model).items(), key=lambda entry: (entry[1], entry[0].encode()))[0]
        del model[next(key for key in model if key[0] == largest)]


async def what_is_held(store: ResponseStore) -> dict[ResponseKey, int]:
    """By size, the oldest first; what Redis has about it must agree, and nothing else may be there."""
    client, ns = store._redis.client, store._namespace
    names = [name.decode() for name in await client.zrange(f"{ns}:responses", 0, -1)]
    sizes = {k.decode(): int(size) for k, size in (await client.hgetall(f"{ns}:response-sizes")).items()}
    assert sum(sizes[name] for name in names) == sizes.pop("", 0) <= MAX_BYTES and sizes.keys() == set(names)
    found = {(name.rpartition(":")[0], name.rpartition(":")[2]): sizes[name] for name in names}
    shares = {
        tenant.decode(): share
        for tenant, share in await client.zrange(f"{ns}:response-holders", 0, -1, withscores=True)
    }
    assert shares == held(found)
    keys = {f"{ns}:response:{name}" for name in names} | {f"{ns}:responses:{tenant}" for tenant in shares}
    indexes = {f"{ns}:{index}" for index in ("responses", "response-sizes", "response-holders")}
    assert {key.decode() async for key in client.scan_iter(f"{ns}:*")} - indexes == keys
    return found


@pytest.mark.parametrize("index", ["responses", "responses:", "response-sizes", "response-holders"])
def test_an_index_that_the_server_has_evicted_is_begun_anew(redis_server: RedisServer, index: str) -> None:
    async def check() -> None:
        async with opened(redis_server, namespace="evicted") as store:
            await store.keep(("", "old"), of_size(900 * KIB))
            with redis.Redis.from_url(redis_server.url) as client:
                client.delete(f"evicted:{index}")
            for name in ("one", "two", "three"):
                await store.keep(("", name), of_size(300 * KIB))
            assert all([await store.get(("", name)) for name in ("one", "two", "three")])
            assert (await store._redis.client.hget("evicted:response-sizes", "")) == str(900 * KIB).encode()

    asyncio.run(check())


async def until(ask: Callable[[], Awaitable[Any]], wanted: object) -> None:
    deadline = time.monotonic() + 60
    while (found := await ask()) != wanted:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.005)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(_steps, max_size=30))
def test_who_holds_most_gives_up_its_oldest(redis_server: RedisServer, steps: list[Step]) -> None:
    async def check() -> None:
        async with opened(redis_server) as store:
            model: dict[ResponseKey, int] = {}  # sizes; the oldest first
            for action, key, size_kib in steps:
                if action == "keep":
                    await store.keep(key, of_size(size_kib * KIB))
                    model.pop(key, None)
                    before = dict(model)
                    if size_kib * KIB <= MAX_BYTES:
                        make_room(model, key, size_kib * KIB)
                    hurt = {tenant for tenant, _ in before.keys() - model.keys()}
                    shares = 1 + len({tenant for tenant, _ in before} | {key[0]})
                    assert all(held(before)[tenant] * shares >= MAX_BYTES or tenant == key[0] for tenant in hurt)
                elif action == "get":
                    assert (await store.get(key) is not None) == (key in model)
                else:
                    assert await store.wish(key, "delete") == (
                        "over" if model.pop(key, None) is not None else "unknown"
                    )
            assert await what_is_held(store) == model

    asyncio.run(check())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    small=st.lists(st.integers(1, 80), max_size=4), large=st.lists(st.integers(1, 1024), max_size=20), data=st.data()
)
def test_nobody_loses_what_is_less_than_an_equal_share(
    redis_server: RedisServer, small: list[int], large: list[int], data: st.DataObject
) -> None:
    """Three keys: two keep less than a third of the store each, one as much as it likes, in any order."""
    writes = [(tenant, size) for tenant in ("b", "c") for size in small] + [("a", size) for size in large]

    async def check() -> None:
        async with opened(redis_server) as store:
            for number, (tenant, size_kib) in enumerate(data.draw(st.permutations(writes))):
                await store.keep((tenant, str(number)), of_size(size_kib * KIB))
            kept = held(await what_is_held(store))
            assert [kept.get(tenant, 0) for tenant in ("b", "c")] == [sum(small) * KIB] * 2

    asyncio.run(check())


@pytest.mark.asyncio
async def test_nothing_outlives_its_time(redis_server: RedisServer) -> None:
    async with opened(redis_server, response_ttl_s=0.02) as store:
        await store.keep(("", "a"), Stored(b"body", streamed=True), [b"event"])
        await until(lambda: store.get(("", "a")), None)
        await store.keep(("", "b"), Stored(b"body"))  # takes what is over out of the total
        assert await store._redis.client.zrange(f"{store._namespace}:responses", 0, -1) == [b":b"]
        await until(lambda: store._redis.client.keys(f"{store._namespace}:*"), [])


@pytest.mark.asyncio
async def test_who_makes_one_hears_what_is_wished_of_it(redis_server: RedisServer) -> None:
    async with opened(redis_server) as maker, opened(redis_server, maker._namespace) as other:
        key = "key-0", "a"
        assert await other.wish(key, "cancel") == "unknown"
        await maker.begin(key, Stored(b"queued", streamed=True))
        assert await other.get(key) == Stored(b"queued", (), True, True)
        assert await maker.tend(key, b"going", 0, [b"0", b"1"]) is None
        assert (await other.get(key), await other.events(key, 0)) == (Stored(b"going", (), True, True), [b"1"])
        assert await other.wish(key, "cancel") == "told"
        assert await maker.tend(key, b"going", 2, [b"2"]) == "cancel"
        await maker.keep(key, Stored(b"over", (b"t",), True), [b"0", b"1", b"2", b"3"])
        assert await other.get(key) == Stored(b"over", (b"t",), True, False)
        assert await other.events(key, -1) == [b"0", b"1", b"2", b"3"]
        await maker.begin(("", "b"), Stored(b"queued"))
        assert await other.wish(("", "b"), "delete") == "told"
        assert await other.get(("", "b")) is None and await other.wish(("", "b"), "delete") == "unknown"
        assert await maker.tend(("", "b"), b"going", 0, []) == "delete"
        await maker.keep(("", "b"), Stored(b"over"))
        assert await other.get(("", "b")) is None and await maker.tend(("", "b"), b"", 0, []) is None


@pytest.mark.asyncio
async def test_what_is_said_late_changes_nothing_that_is_over(redis_server: RedisServer) -> None:
    async with opened(redis_server) as store:
        key = "", "a"
        await store.begin(key, Stored(b"queued", streamed=True))
        await store.keep(key, Stored(b"over", streamed=True), [b"0", b"1"])
        assert await store.tend(("", "a"), b"going", 0, [b"0"]) is None  # overtaken on its way
        assert await store.get(key) == Stored(b"over", streamed=True)
        assert await store.events(("", "a"), -1) == [b"0", b"1"]


@pytest.mark.asyncio
async def test_events_that_are_told_twice_are_there_once(redis_server: RedisServer) -> None:
    async with opened(redis_server) as store:
        await store.begin(("", "a"), Stored(b"queued", streamed=True))
        for first, events in ((0, [b"0", b"1"]), (0, [b"0", b"1", b"2"]), (3, [b"3"]), (2, [b"2", b"3"])):
            assert await store.tend(("", "a"), b"going", first, events) is None
        assert await store.events(("", "a"), -1) == [b"0", b"1", b"2", b"3"]


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
            store.tend(("", "a"), b"body", 0, []),
        ):
            with pytest.raises(Unavailable, match="Redis"):
                await asked
