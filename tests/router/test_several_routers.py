"""Four routers over one Redis and the same workers: they see each other's choices, and leave nothing reserved."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.common.messages import GenerateRequest
from penstock.common.sampling import SamplingParams
from tests.router.fake_worker import FakeWorker
from tests.router.services import Collector, ended, play, routers, send, until

ROUTERS = 4
WORKERS = 4
REQUESTS = 400


@pytest.fixture
def workers(redis_server: Any) -> Iterator[list[FakeWorker]]:
    started = [FakeWorker(redis_server.url, f"d{i}") for i in range(WORKERS)]
    yield started
    for worker in started:
        worker.close()


def request(name: str, prompt_tokens: int, output_tokens: int = 5) -> GenerateRequest:
    prompt = [random.randrange(1000) for _ in range(prompt_tokens)]
    return GenerateRequest(
        request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(seed=3, max_tokens=output_tokens)
    )


def test_requests_that_come_at_once_do_not_book_one_worker_twice(redis_server, workers):
    async def scenario() -> None:
        # A policy that looks at nothing but load: any other reason to prefer a worker would be one to share it.
        async with routers(redis_server.url, ROUTERS, WORKERS, routing_policy="least-load") as services:
            for turn in range(10):
                for worker in workers:
                    worker.limit = 2
                    worker.submitted.clear()
                sinks = await asyncio.gather(
                    *(send(service, request(f"r{turn}-{i}", 50)) for i, service in enumerate(services))
                )
                await until(lambda: sum(len(worker.submitted) for worker in workers) == ROUTERS)
                assert [len(worker.submitted) for worker in workers] == [1] * WORKERS, "each router found an idle one"
                for worker in workers:
                    worker.limit = 1 << 30
                await ended(*sinks)
                assert all(sink.complete() for sink in sinks)
                await until(lambda: all(service.counters()["reserved_tokens"] == 0 for service in services))

    play(scenario())
    with contextlib.closing(redis_server.client()) as client:
        assert client.keys("penstock:load:*") == [] and not client.exists("penstock:routers")


def test_requests_through_all_routers_are_answered_once(redis_server, workers):
    """How evenly they are spread is measured by benchmarks/several_routers.py: where threads wait for a core, a worker
    that waits longest is rightly given less."""

    async def scenario() -> None:
        async with routers(redis_server.url, ROUTERS, WORKERS) as services:
            slots = asyncio.Semaphore(24)

            async def one(i: int) -> Collector:
                async with slots:
                    sink = await send(services[i % ROUTERS], request(f"r{i}", 100, 2))
                    await ended(sink)
                return sink

            sinks = await asyncio.gather(*(one(i) for i in range(REQUESTS)))
            assert all(sink.complete() for sink in sinks)
        assert sum(len(worker.submitted) for worker in workers) == REQUESTS
        assert all(worker.submitted for worker in workers)

    play(scenario())


def test_a_router_that_dies_is_forgotten_after_a_lease(redis_server, workers):
    async def scenario() -> None:
        async with routers(redis_server.url, 2, WORKERS, lease_s=2.0) as (dying, other):
            for worker in workers:
                worker.limit = 2
            await asyncio.gather(*(send(dying, request(f"r{i}", 50)) for i in range(8)))
            await until(lambda: sum(len(worker.submitted) for worker in workers) == 8)
            incarnations = [worker.info.incarnation for worker in workers]
            deadline = time.monotonic() + 60
            while True:  # what the last requests added is written a little after they were sent
                lookups = await other._reader.look_up(incarnations, []) or {}
                if sum(one.reserved_tokens for one in lookups.values()) >= 8 * 50:
                    break
                assert time.monotonic() < deadline, lookups
                await asyncio.sleep(0.05)
            assert dying._reservations._task is not None
            dying._reservations._task.cancel()  # as if its process had been killed: nothing is written any more

            deadline = time.monotonic() + 60
            while any(one.reserved_tokens for one in lookups.values()) or other._reader.other_routers:
                assert time.monotonic() < deadline, lookups
                await asyncio.sleep(0.05)
                lookups = await other._reader.look_up(list(lookups), []) or lookups

    play(scenario())
