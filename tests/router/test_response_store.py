"""The store of responses on a real Redis: against a plain model of what has to go; lifetimes; what others wish."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.common.config import RouterConfig
from penstock.common.errors import NotFound, Unavailable
from penstock.router.responses.answer import written_event
from penstock.router.responses.following import StoredLog, follow
from penstock.router.responses.store import GONE, ResponseKey, ResponseStore, Stored
from tests.conftest import RedisServer

MAX_BYTES = 1 << 20
KIB = 1 << 10
NAMES = itertools.count()
A = "", "a"
EVENTS = [
    written_event(f"response.{name}", number, {"response": {"status": name, "output": []}})
    for number, name in enumerate(("queued", "in_progress", "completed"))
]
GOING = b'{"status":"in_progress","output":[]}'
Step = tuple[str, ResponseKey, int]
_keys = st.tuples(st.sampled_from(["", "key-0", "a:b"]), st.sampled_from("abcd"))
_steps = st.tuples(st.sampled_from(["keep", "tell", "tell", "look", "delete"]), _keys, st.integers(1, 1200))


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
    model.pop(key, None)
    if size > MAX_BYTES:
        return
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
    there = {key.decode() async for key in client.scan_iter(f"{ns}:*")} - indexes
    assert there == keys | {f"{key}{part}" for key in keys for part in (":log", ":runner")} & there
    return found


async def body_of(store: ResponseStore, key: ResponseKey) -> bytes | None:
    try:
        return (await store.get(key)).body
    except NotFound:
        return None


async def log_of(store: ResponseStore, key: ResponseKey) -> bytes | None:
    try:
        return (await store.read(key, 0)).log
    except NotFound:
        return None


@pytest.mark.parametrize("index", ["responses", "responses:", "response-sizes", "response-holders"])
def test_an_index_that_the_server_has_evicted_is_begun_anew(redis_server: RedisServer, index: str) -> None:
    async def check() -> None:
        async with opened(redis_server, namespace="evicted") as store:
            await store.keep(("", "old"), of_size(900 * KIB))
            with redis.Redis.from_url(redis_server.url) as client:
                client.delete(f"evicted:{index}")
            for name in ("one", "two", "three"):
                await store.keep(("", name), of_size(300 * KIB))
            assert all([await body_of(store, ("", name)) for name in ("one", "two", "three")])
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
            told: dict[ResponseKey, int] = {}  # bytes of the log of those that are in the making
            for action, key, size_kib in steps:
                before, size = dict(model), size_kib * KIB
                if action == "keep":
                    await store.keep(key, of_size(size))
                    told.pop(key, None)
                    make_room(model, key, size)
                elif action == "tell" and (key in told or key not in model):  # else it is over
                    offset = told.get(key, 0)
                    await store.tell(key, True, offset, b"e" * size)
                    told[key] = offset + size
                    if not offset or key in model:  # else it had to go, and is not begun again
                        make_room(model, key, told[key])
                elif action == "delete" and key not in told:
                    known = model.pop(key, None) is not None
                    assert await store.wish(key, "delete") == ("over" if known else "unknown")
                else:
                    found = await log_of(store, key)
                    assert found == (None if key not in model else b"e" * told[key] if key in told else b"")
                tenants = held(before).keys() | {key[0]}
                hurt = {tenant for tenant, _ in before.keys() - model.keys()} - {key[0]}
                assert all(held(before)[tenant] * len(tenants) >= MAX_BYTES for tenant in hurt)
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
    async with opened(redis_server, response_ttl_s=0.02) as short, opened(redis_server, short._namespace) as long:
        await short.keep(A, Stored(b"body", streamed=True), EVENTS[0])
        await until(lambda: body_of(short, A), None)
        await until(lambda: short._redis.client.keys(f"{short._namespace}:*"), [])
        await long.keep(("", "b"), Stored(b"body"))
        await short.keep(A, Stored(b"body"))
        await until(lambda: body_of(short, A), None)
        await long.keep(("", "c"), Stored(b"body"))  # takes what is over out of the total
        assert await what_is_held(long) == {("", "b"): 5, ("", "c"): 5}


@pytest.mark.asyncio
async def test_who_makes_one_hears_what_is_wished_of_it(redis_server: RedisServer) -> None:
    async with opened(redis_server) as maker, opened(redis_server, maker._namespace) as other:
        key = "key-0", "a"
        assert await other.wish(key, "cancel") == "unknown"
        assert await maker.tell(key, True, 0, EVENTS[0]) == (False, False, False)
        assert await other.get(key) == Stored(b'{"status":"queued","output":[]}', (), True, True)
        assert await maker.tell(key, True, len(EVENTS[0]), EVENTS[1]) == (False, False, False)
        assert (await body_of(other, key), await log_of(other, key)) == (GOING, EVENTS[0] + EVENTS[1])
        assert (await other.read(key, len(EVENTS[0]))).log == EVENTS[1]
        assert await other.wish(key, "cancel") == "told"
        told = len(EVENTS[0] + EVENTS[1])
        assert await maker.tell(key, True, told, b"") == (True, False, False)
        await maker.keep(key, Stored(b"over", (b"t",), True), b"".join(EVENTS), told)
        assert await other.get(key) == Stored(b"over", (b"t",), True, False)
        assert await log_of(other, key) == b"".join(EVENTS)
        await maker.tell(A, False, 0, EVENTS[0])
        assert await other.wish(A, "delete") == "told"
        assert await body_of(other, A) is None and await other.wish(A, "delete") == "unknown"
        assert await maker.tell(A, False, len(EVENTS[0]), b"") == (True, False, False)
        await maker.keep(A, Stored(b"over"))
        assert await body_of(other, A) is None and await what_is_held(maker) == {key: 4 + 4 + len(b"".join(EVENTS))}


@pytest.mark.asyncio
@pytest.mark.parametrize("streamed", [False, True])
async def test_the_log_of_what_nobody_can_follow_goes(redis_server: RedisServer, streamed: bool) -> None:
    async with opened(redis_server) as store:
        await store.tell(A, streamed, 0, EVENTS[0])
        await store.keep(A, Stored(b"over", streamed=streamed), EVENTS[0] + EVENTS[1], len(EVENTS[0]))
        assert await log_of(store, A) == (EVENTS[0] + EVENTS[1] if streamed else b"")
        await store.tell(A, streamed, 0, EVENTS[0])  # overtaken on its way
        assert await store.get(A) == Stored(b"over", streamed=streamed)


@pytest.mark.asyncio
async def test_what_is_told_twice_is_there_once_and_what_was_lost_at_the_end(redis_server: RedisServer) -> None:
    async with opened(redis_server) as store:
        whole = b"".join(EVENTS)
        for offset, end in ((0, 10), (0, 15), (15, 17), (10, 25)):
            await store.tell(A, True, offset, whole[offset:end])
        assert await log_of(store, A) == whole[:25]
        await store._redis.client.flushall()
        assert await store.tell(A, True, 25, whole[25:]) == (False, False, True)
        assert await log_of(store, A) is None
        await store.keep(A, Stored(b"over", streamed=True), whole, 25)
        assert (await body_of(store, A), await log_of(store, A)) == (b"over", whole)


@pytest.mark.asyncio
async def test_one_that_grows_too_large_goes_alone(redis_server: RedisServer) -> None:
    async with opened(redis_server) as store:
        await store.keep(("", "b"), Stored(b"body"))
        await store.tell(A, True, 0, b"e" * 900 * KIB)
        await store.tell(A, True, 900 * KIB, b"e" * 200 * KIB)
        assert (await log_of(store, A), await body_of(store, ("", "b"))) == (None, b"body")


@pytest.mark.asyncio
async def test_a_maker_that_dies_is_noticed(redis_server: RedisServer) -> None:
    async with opened(redis_server, lease_s=0.1) as store:
        await store.tell(A, False, 0, EVENTS[0] + EVENTS[1])
        failed = {"status": "failed", "output": [], "error": {"code": "server_error", "message": GONE}}
        await until(lambda: body_of(store, A), msgspec.json.encode(failed))
        assert not (await store.get(A)).made_elsewhere


@pytest.mark.asyncio
@pytest.mark.parametrize("after", [-1, 1, 5])
async def test_who_follows_a_maker_that_dies_is_told(redis_server: RedisServer, after: int) -> None:
    sent: list[MutableMapping[str, Any]] = []

    async def take(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async with opened(redis_server, lease_s=0.1) as store:
        await store.tell(A, True, 0, EVENTS[0] + EVENTS[1])
        for _ in range(2):  # as it happens, and looked at later
            bell = asyncio.Event()
            async with store.changes(A, bell):
                await follow(StoredLog(store, A, bell), after, asyncio.Event().wait, take, [])
            failed = json.loads(
                b'{"status":"failed","output":[],"error":{"code":"server_error","message":"%b"}}' % GONE.encode()
            )
            events = [*EVENTS[:2], written_event("response.failed", 2, {"response": failed})]
            assert b"".join(message["body"] for message in sent[1:]) == b"".join(events[after + 1 :])
            sent.clear()


@pytest.mark.asyncio
async def test_bells_ring_for_news_and_for_what_may_have_been_missed(own_redis: RedisServer) -> None:
    async with opened(own_redis) as maker, opened(own_redis, maker._namespace) as other:
        bells = [asyncio.Event() for _ in range(4)]
        async with maker.wishes(A, bells[0]), other.changes(A, bells[1]):
            async with other.changes(A, bells[2]), other.changes(("", "b"), bells[3]):
                for bell in bells:  # the subscriptions have begun
                    await asyncio.wait_for(bell.wait(), 60)
                    bell.clear()
                assert await maker.tell(A, True, 0, EVENTS[0]) == (False, True, False)
                assert await maker.tell(A, True, len(EVENTS[0]), b"") == (False, False, False)  # no news
                for bell in bells[1:3]:
                    await asyncio.wait_for(bell.wait(), 60)
                await other.wish(A, "cancel")
                await asyncio.wait_for(bells[0].wait(), 60)
                assert not bells[3].is_set()
            others = f"{maker._namespace}:response::b"  # to which nobody listens any more
            await until(lambda: maker._redis.client.pubsub_channels(others), [])
            own_redis.stop()
            for bell in bells[:2]:
                await asyncio.wait_for(bell.wait(), 60)
            own_redis.start()
            await until(lambda: told_and_heard(maker, bells[1]), True)


async def told_and_heard(maker: ResponseStore, bell: asyncio.Event) -> bool:
    """Whether somebody hears of what is told."""
    bell.clear()
    try:
        heard = (await maker.tell(A, True, 0, EVENTS[0]))[1]
    except Unavailable:  # it is believed to be away for a while
        return False
    if heard:
        await asyncio.wait_for(bell.wait(), 60)
    return heard


@pytest.mark.asyncio
async def test_redis_is_away(own_redis: RedisServer) -> None:
    own_redis.stop()
    async with opened(own_redis) as store:
        await store.keep(A, Stored(b"body"))  # the answer is given all the same
        for asked in (store.get(A), store.read(A, 0), store.wish(A, "cancel"), store.tell(A, True, 0, EVENTS[0])):
            with pytest.raises(Unavailable, match="Redis"):
                await asked
