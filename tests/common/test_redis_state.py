"""Registration, look-up and reservations against a real redis-server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import pytest

from penstock.common import redis_state, reservations, router_redis
from penstock.common.messages import WorkerInfo, encode
from penstock.common.page_hash import chained, page_hashes, root_hash
from penstock.common.prefix_index import pack
from penstock.common.redis_state import FleetReader, Lookup, RegistryWriter
from penstock.common.reservations import Reservations
from tests.index_view import index_view, pages_held
from tests.worker_info import worker_info

HASHES = list(page_hashes(root_hash("scope"), list(range(4 * 200)), 4))
PAGES = chained(HASHES)


def worker(incarnation: str = "i1", lease_s: float = 10.0) -> WorkerInfo:
    return worker_info(incarnation=incarnation, lease_s=lease_s)


@contextlib.asynccontextmanager
async def within(limit_s: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, which Python 3.10 has not."""
    task = asyncio.current_task()
    assert task is not None
    handle = asyncio.get_running_loop().call_later(limit_s, task.cancel)
    yield
    handle.cancel()


def renewed_twice(client: Any, lease_s: float, *keys: str) -> None:
    """The keys' lives, made long here, are set back to a lease."""
    for _ in range(2):
        for key in keys:
            eventually(lambda key=key: client.expire(key, 1000) == 1)
        for key in keys:
            eventually(lambda key=key: 0 < client.pttl(key) <= lease_s * 1000)


def eventually(check: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def with_reader(url: str, use: Callable[[FleetReader], Awaitable[Any]], router_id: str = "r1") -> Any:
    async def run() -> Any:
        reader = FleetReader(url, "ns", router_id)
        try:
            return await use(reader)
        finally:
            await reader.close()

    return asyncio.run(run())


def packed(hashes: Iterable[bytes]) -> set[bytes]:
    return {pack([page]) for page in hashes}


def held(url: str, incarnations: list[str], hashes: list[bytes]) -> dict[str, int]:
    found = with_reader(url, lambda reader: reader.look_up(incarnations, hashes))
    return {incarnation: one.held_pages for incarnation, one in found.items()}


def test_a_worker_registers_announces_its_pages_and_takes_both_back(redis_server):
    writer = RegistryWriter(redis_server.url, "ns", worker())
    with contextlib.closing(redis_server.client()) as client:
        writer.publish(PAGES[:5], [])
        eventually(lambda: pages_held(client, "ns", "i1") == 5)
        assert with_reader(redis_server.url, lambda reader: reader.workers()) == [worker()]
        assert 0 < client.pttl("ns:worker:i1") <= 10_000
        assert 0 < client.pttl("ns:index:i1") <= 10_000
        assert all(client.pttl(key) > 0 for key in client.keys("*")), "whoever stops refreshing leaves nothing for ever"
        assert held(redis_server.url, ["i1", "nobody"], HASHES) == {"i1": 5, "nobody": 0}

        writer.publish([(HASHES[7], b"")], [HASHES[2]])
        eventually(lambda: index_view(client, "ns")["i1"] == packed(HASHES[i] for i in (0, 1, 7)))
        assert held(redis_server.url, ["i1"], HASHES) == {"i1": 2}, "a run ends at the first page that is missing"
        writer.close()
        assert client.keys("*") == []


def test_a_page_that_leaves_and_returns_within_one_batch_is_held(redis_server):
    writer = RegistryWriter(redis_server.url, "ns", worker())
    with contextlib.closing(redis_server.client()) as client:
        writer.publish(PAGES[:6], [])
        writer.publish([], HASHES[:6])
        writer.publish(PAGES[:3], [])
        eventually(lambda: index_view(client, "ns").get("i1") == packed(HASHES[:3]))
    writer.close()


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 128, 200])
def test_look_up_counts_runs_of_any_length(redis_server, length):
    writer = RegistryWriter(redis_server.url, "ns", worker())
    writer.publish(PAGES[:length], [])
    with contextlib.closing(redis_server.client()) as client:
        eventually(lambda: writer.connected and pages_held(client, "ns", "i1") == length)
    assert held(redis_server.url, ["i1"], HASHES) == {"i1": length}
    assert held(redis_server.url, ["i1"], HASHES[:70]) == {"i1": min(length, 70)}
    assert held(redis_server.url, ["i1"], []) == {"i1": 0}
    writer.close()


def test_a_lease_that_is_not_renewed_ends(redis_server):
    writer = RegistryWriter(redis_server.url, "ns", worker(lease_s=1.0))
    writer.publish(PAGES[:2], [])
    with contextlib.closing(redis_server.client()) as client:
        renewed_twice(client, 1.0, "ns:worker:i1", "ns:index:i1")
        writer.close(deregister=False)
        eventually(lambda: client.exists("ns:worker:i1", "ns:index:i1") == 0)
        assert with_reader(redis_server.url, lambda reader: reader.workers()) == []
        assert client.smembers("ns:workers") == set()


def test_records_of_another_version_are_left_out_and_told_of_once(redis_server, caplog):
    with contextlib.closing(redis_server.client()) as client:
        for incarnation, record in {"a": b"\xc1", "b": b"\x80", "c": encode(worker("c"))}.items():
            client.sadd("ns:workers", incarnation)
            client.set(f"ns:worker:{incarnation}", record)

    async def read_again(reader: FleetReader) -> None:
        for _ in range(3):
            assert await reader.workers() == [worker("c")]
        with contextlib.closing(redis_server.client()) as client:
            client.delete("ns:worker:a")
        assert await reader.workers() == [worker("c")]
        assert reader._unreadable == {"b"}, "no more than are listed"

    with_reader(redis_server.url, read_again)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2 and "worker a cannot be read" in told[0] and "worker b cannot be read" in told[1]


def test_a_redis_that_comes_back_empty_hears_everything_again(own_redis):
    writer = RegistryWriter(own_redis.url, "ns", worker(lease_s=0.6))
    writer.publish(PAGES[:100], [])
    with contextlib.closing(own_redis.client()) as client:
        eventually(lambda: pages_held(client, "ns", "i1") == 100)
        client.flushall()  # nothing shows on the connection: that the slot is gone does
        eventually(lambda: pages_held(client, "ns", "i1") == 100)
    own_redis.stop()
    eventually(lambda: not writer.connected)
    writer.publish(PAGES[100:102], HASHES[101:102])
    own_redis.start()
    with contextlib.closing(own_redis.client()) as client:
        eventually(lambda: pages_held(client, "ns", "i1") == 102)
        assert client.exists("ns:worker:i1")
        figures = {"index_pages": 102, "index_pending": 0, "index_losses": 2, "index_repaired": 0}
        eventually(lambda: writer.index_load() == figures)
    writer.close()


def test_a_redis_that_takes_nothing_is_told_of_in_its_words(own_redis, caplog):
    with contextlib.closing(own_redis.client()) as client:
        client.replicaof("127.0.0.1", 1)
    writer = RegistryWriter(own_redis.url, "ns", worker())
    eventually(lambda: bool(caplog.records))
    writer.close()
    assert caplog.messages[0] == "Redis is away: You can't write against a read only replica."


def test_changes_kept_for_a_redis_that_is_away_are_bounded(own_redis, monkeypatch):
    monkeypatch.setattr(redis_state, "MAX_PENDING", 50)
    own_redis.stop()
    writer = RegistryWriter(own_redis.url, "ns", worker(lease_s=0.6))
    for i in range(0, 150):
        writer.publish([(HASHES[i], b"")], HASHES[i - 10 : i - 9] if i >= 10 else [])
        assert writer._announcements.num_pending <= 50
    own_redis.start()
    with contextlib.closing(own_redis.client()) as client:
        eventually(lambda: index_view(client, "ns").get("i1") == packed(HASHES[140:150]))
    writer.close()


def test_closing_while_redis_is_away_does_not_hang(own_redis):
    own_redis.stop()
    writer = RegistryWriter(own_redis.url, "ns", worker())
    writer.publish(PAGES, [])
    writer.close()
    assert not writer._thread.is_alive()


def test_routers_see_each_others_reservations_but_not_their_own(redis_server):
    async def scenario() -> None:
        readers = {name: FleetReader(redis_server.url, "ns", name) for name in ("r1", "r2", "r3")}
        loads = {name: Reservations(redis_server.url, "ns", name, 10.0) for name in ("r1", "r2")}

        async def seen(by: str) -> list[int]:
            found = await readers[by].look_up(["i1", "i2"], HASHES)
            assert found is not None
            return [found["i1"].reserved_tokens, found["i2"].reserved_tokens]

        async def becomes(by: str, expected: list[int]) -> None:
            async with within(60):
                while await seen(by) != expected:
                    await asyncio.sleep(0.01)

        for one in loads.values():
            one.start()
        loads["r1"].publish("i1", 100)
        loads["r2"].publish("i1", 7)
        loads["r2"].publish("i2", 50)
        await becomes("r3", [107, 50])
        assert await seen("r1") == [7, 50]
        assert await seen("r2") == [100, 0]
        loads["r2"].publish("i1", 0)
        await becomes("r3", [100, 50])
        for one in loads.values():
            await one.close()
        assert await seen("r3") == [0, 0]
        for reader in readers.values():
            await reader.close()

    asyncio.run(scenario())
    with contextlib.closing(redis_server.client()) as client:
        assert client.keys("*") == []


def test_who_asks_for_the_workers_hears_how_many_routers_there_are(redis_server):
    """Where there is one worker, nothing is ever looked up."""

    async def scenario() -> None:
        reader = FleetReader(redis_server.url, "ns", "r1")
        loads = [Reservations(redis_server.url, "ns", name, 10.0) for name in ("r1", "r2", "r3")]
        for load in loads:
            load.start()
            await load.claim()
        assert await reader.workers() == [] and reader.other_routers == 2
        for load in loads:
            await load.close()
        assert await reader.workers() == [] and reader.other_routers == 0
        await reader.close()

    asyncio.run(scenario())


def test_a_dead_routers_reservations_vanish(redis_server):
    async def scenario() -> None:
        load = Reservations(redis_server.url, "ns", "r1", 1.0)
        load.start()
        load.publish("i1", 5)
        with contextlib.closing(redis_server.client()) as client:
            await asyncio.to_thread(renewed_twice, client, 1.0, "ns:load:r1")
            await asyncio.to_thread(eventually, lambda: client.hgetall("ns:load:r1") == {b"": b"0", b"i1": b"5"})
            assert load._task is not None
            load._task.cancel()
            eventually(lambda: client.exists("ns:load:r1") == 0)
        reader = FleetReader(redis_server.url, "ns", "r2")
        found = await reader.look_up(["i1"], [])
        assert found is not None and found["i1"].reserved_tokens == 0
        await reader.close()
        await load.close()

    asyncio.run(scenario())


def test_a_redis_that_answers_while_the_event_loop_is_held_up_is_not_away(own_redis, monkeypatch):
    monkeypatch.setattr(router_redis, "READER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(router_redis, "AWAY_S", 0.1)

    async def scenario() -> None:
        reader = FleetReader(own_redis.url, "ns", "r1")
        while await reader.look_up(["i1"], HASHES) is None:  # until it is connected, and Redis knows the script
            await asyncio.sleep(0.01)
        failures = reader.failures
        own_redis.freeze()
        asked = asyncio.ensure_future(reader.look_up(["i1"], HASHES))
        await asyncio.sleep(0.01)
        own_redis.thaw()
        time.sleep(1.2)  # whatever holds it up
        assert await asked == {"i1": Lookup(0, 0)} and reader.failures == failures
        await reader.close()

    asyncio.run(scenario())


def test_connecting_to_a_redis_that_is_far_goes_on_when_nobody_waits_for_it_any_more(redis_server, monkeypatch):
    """It takes several round trips: begun anew each time it would never be done."""
    for module in (redis_state, router_redis):
        monkeypatch.setattr(module, "AWAY_S", 0.0)

    async def scenario() -> None:
        arrived, connections = asyncio.Event(), []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append(writer)
            await arrived.wait()
            there = await asyncio.open_connection("127.0.0.1", urlsplit(redis_server.url).port)
            await asyncio.gather(_copy(reader, there[1]), _copy(there[0], writer))

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as far:
            url = f"redis://127.0.0.1:{far.sockets[0].getsockname()[1]}"
            for closed_early in (True, False):
                arrived.clear()
                connections.clear()
                reader = FleetReader(url, "ns", "r1")
                monkeypatch.setattr(router_redis, "READER_TIMEOUT_S", 0.01)
                while not connections:
                    assert await reader.workers() is None
                assert await reader.workers() is None
                monkeypatch.setattr(router_redis, "READER_TIMEOUT_S", 60.0)
                if closed_early:
                    await reader.close()
                arrived.set()
                if not closed_early:
                    assert await reader.workers() == []
                    await reader.close()
                assert len(connections) == 1

    asyncio.run(scenario())


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
    writer.close()


@pytest.mark.parametrize("hangs", [False, True])
def test_readers_answer_none_while_redis_is_away_and_recover(own_redis, monkeypatch, hangs):
    for module in (redis_state, reservations, router_redis):
        monkeypatch.setattr(module, "AWAY_S", 0.2)
    monkeypatch.setattr(router_redis, "READER_TIMEOUT_S", 0.5 if hangs else 60.0)
    go, come_back = (own_redis.freeze, own_redis.thaw) if hangs else (own_redis.stop, own_redis.start)
    writer = RegistryWriter(own_redis.url, "ns", worker(lease_s=0.6))

    async def scenario() -> None:
        reader = FleetReader(own_redis.url, "ns", "r1")
        load = Reservations(own_redis.url, "ns", "r1", 1.0)
        load.start()
        load.publish("i1", 3)
        async with within(60):
            while not await reader.workers():
                await asyncio.sleep(0.01)
            go()
            assert await reader.workers() is None
            assert await reader.look_up(["i1"], HASHES) is None
            failures = reader.failures
            for _ in range(100):
                assert await reader.look_up(["i1"], HASHES) is None
            assert reader.failures <= failures + 1, "while it is away nobody asks"
            come_back()
            while await reader.workers() != [worker(lease_s=0.6)]:
                await asyncio.sleep(0.01)
            with contextlib.closing(own_redis.client()) as client:
                while client.hgetall("ns:load:r1") != {b"": b"0", b"i1": b"3"}:
                    await asyncio.sleep(0.01)
        await load.close()
        await reader.close()

    asyncio.run(scenario())
    writer.close()
