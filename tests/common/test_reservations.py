"""Claims on a real redis-server: of two at once the second sees the first, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable

from penstock.common import reservations, router_redis
from penstock.common.reservations import Reservations

LIMIT_S = 60.0


async def until(check: Callable[[], bool]) -> None:
    async def loop() -> None:
        while not check():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(loop(), LIMIT_S)


def play(url: str, count: int, scenario: Callable[[list[Reservations]], Awaitable[None]]) -> None:
    async def run() -> None:
        routers = [Reservations(url, "ns", f"r{i}", 10.0) for i in range(count)]
        for router in routers:
            router.start()
        try:
            await scenario(routers)
        finally:
            for router in routers:
                await router.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_of_two_claims_at_least_one_sees_the_other(redis_server):
    async def scenario(routers: list[Reservations]) -> None:
        for turn in range(40):
            for router in routers:
                router.publish(f"i{turn}", 7)
            seen = await asyncio.gather(*(router.claim() for router in routers))
            for first, second in itertools.combinations(seen, 2):
                assert first is not None and second is not None
                assert max(first.get(f"i{turn}", 0), second.get(f"i{turn}", 0)) >= 7

            assert max(others.get(f"i{turn}", 0) for others in seen) == 7 * 3, "the last one saw all"

    play(redis_server.url, 4, scenario)
    with contextlib.closing(redis_server.client()) as client:
        assert client.keys("*") == []


def test_many_claims_of_one_router_share_writes(redis_server):
    async def scenario(routers: list[Reservations]) -> None:
        with contextlib.closing(redis_server.client()) as client:
            before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
            routers[0].publish("i1", 5)
            assert await asyncio.gather(*(routers[0].claim() for _ in range(200))) == [{}] * 200
            assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before < 20
            assert client.hgetall("ns:load:r0") == {b"": b"0", b"i1": b"5"}

    play(redis_server.url, 1, scenario)


def test_a_claim_that_is_given_up_leaves_the_others(redis_server):
    async def scenario(routers: list[Reservations]) -> None:
        claims = [asyncio.ensure_future(routers[0].claim()) for _ in range(3)]
        await asyncio.sleep(0)
        claims[0].cancel()
        assert await asyncio.gather(*claims[1:]) == [{}, {}] and claims[0].cancelled()

    play(redis_server.url, 1, scenario)


def test_claims_while_redis_is_away_or_the_router_ends_are_answered(own_redis, monkeypatch):
    for module in (reservations, router_redis):
        monkeypatch.setattr(module, "AWAY_S", 0.2)

    async def scenario(routers: list[Reservations]) -> None:
        own_redis.stop()
        assert await asyncio.gather(*(routers[0].claim() for _ in range(5))) == [None] * 5
        routers[0].publish("i1", 3)
        own_redis.start()
        with contextlib.closing(own_redis.client()) as client:
            await until(lambda: client.hgetall("ns:load:r0") == {b"": b"0", b"i1": b"3"})
        late = asyncio.ensure_future(routers[0].claim())
        await asyncio.sleep(0)
        await routers[0].close()
        assert await asyncio.wait_for(late, LIMIT_S) in (None, {})

    play(own_redis.url, 1, scenario)
