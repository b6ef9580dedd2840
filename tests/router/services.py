"""What tests of the router service share: one that leaves nothing behind, and sinks that check what comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from penstock.common.config import RouterConfig
from penstock.common.errors import PenstockError
from penstock.common.messages import GenerateRequest, TokenDelta
from penstock.common.sampling import SamplingParams
from penstock.common.text_probe import TextProbe
from penstock.router.service import RouterService
from tests.router.fake_worker import oracle

LIMIT_S = 60.0
LEASE_S = 2.0  # where its end, or a stall, is awaited; else it is longer than any machine stands still


class Collector:
    """A sink that keeps what came and checks the order."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.error: PenstockError | None = None
        self.deltas: list[TokenDelta] = []
        self.ended = asyncio.Event()
        self.some = asyncio.Event()

    def on_delta(self, delta: TokenDelta) -> None:
        assert not self.ended.is_set() and delta.index == len(self.tokens)
        self.tokens += delta.token_ids
        self.deltas.append(delta)
        self.some.set()
        if delta.finish is not None:
            self.ended.set()

    def on_error(self, error: PenstockError) -> None:
        assert not self.ended.is_set()
        self.error = error
        self.ended.set()

    def complete(self) -> bool:
        return self.error is None and self.tokens == oracle(self.request)


def request(name: str, tokens: int = 20, choice: int = 0, prompt: list[int] | None = None) -> GenerateRequest:
    sampling = SamplingParams(seed=3, max_tokens=tokens)
    return GenerateRequest(
        request_id=name, choice=choice, prompt_token_ids=prompt or [5, 6, 7, 8, 9], sampling=sampling
    )


async def until(check: Callable[[], Any]) -> None:
    async def loop() -> None:
        while not check():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(loop(), LIMIT_S)


async def send(service: RouterService, one: GenerateRequest) -> Collector:
    sink = Collector(one)
    await service.submit(one, sink)
    return sink


async def ended(*sinks: Collector) -> None:
    await asyncio.wait_for(asyncio.gather(*(sink.ended.wait() for sink in sinks)), LIMIT_S)


@contextlib.asynccontextmanager
async def running(
    url: str, workers: int, texts: TextProbe | None = None, **options: Any
) -> AsyncIterator[RouterService]:
    """A service that sees `workers` workers, and that leaves nothing behind."""
    config: dict[str, Any] = {"lease_s": 30.0, "slow_start_s": 0.0, **options}
    service = RouterService(RouterConfig(redis_url=url, **config), texts)
    await service.start()
    try:
        await until(lambda: len(service.loads()) == workers)
        yield service
    finally:
        await service.stop(0.0)
        assert service.counters()["in_flight"] == 0 and service.counters()["reserved_tokens"] == 0
        assert service._context.closed
        assert asyncio.all_tasks() == {asyncio.current_task()}


@contextlib.asynccontextmanager
async def routers(url: str, count: int, workers: int, **options: Any) -> AsyncIterator[list[RouterService]]:
    """Services that see all `workers` and know of each other; afterwards nothing is reserved, here or in Redis."""
    services = [RouterService(RouterConfig(redis_url=url, **{"lease_s": 30.0, **options})) for _ in range(count)]
    for service in services:
        await service.start()
    try:
        await until(lambda: all(len(service.loads()) == workers for service in services))
        yield services
    finally:
        for service in services:
            await service.stop(0.0)
            assert service.counters()["in_flight"] == 0 and service.counters()["reserved_tokens"] == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}


def play(scenario: Awaitable[None]) -> None:
    async def run() -> None:
        await scenario

    asyncio.run(run())
