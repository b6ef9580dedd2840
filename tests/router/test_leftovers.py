"""What a router holds when workers and requests have come and gone: nothing of theirs. Nor does Redis."""

from __future__ import annotations

import asyncio
import gc
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from penstock.common import redis_state
from penstock.router import health
from penstock.router.metrics import RouterMetrics
from penstock.router.service import RouterService
from tests.router.fake_router import Router
from tests.router.fake_worker import FakeWorker
from tests.router.services import LEASE_S, ended, play, request, running, send, until

BATCHES, WORKERS = 4, 25
GONE = "gone-"  # how the workers are called that do not stay
COMPLETION = {"model": "tiny", "prompt": "a", "max_tokens": 3}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}


@pytest.fixture
def garbage() -> Iterator[Callable[[], Counter[str]]]:
    """Collects, and tells which objects of ours only the collector could free, by type."""
    gc.collect()
    gc.collect()  # what the first has freed may hold more, behind objects that are not Python's
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    def collect() -> Counter[str]:
        gc.collect()
        found = Counter(type(one).__name__ for one in gc.garbage if type(one).__module__.startswith("penstock."))
        gc.garbage.clear()
        return found

    yield collect
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", COMPLETION, 200),
        ("/v1/completions", {**COMPLETION, "stream": True, "n": 2}, 200),
        ("/v1/completions", {**COMPLETION, "max_tokens": -1}, 400),
        ("/v1/chat/completions", CHAT, 200),
        ("/v1/chat/completions", {**CHAT, "stream": True}, 200),
        ("/v1/messages", CHAT, 200),
    ],
)
def test_what_an_answer_needed_is_freed_at_once(
    router: Router, garbage: Callable[[], Counter[str]], path: str, body: dict[str, Any], status: int
) -> None:
    """And not when a collection comes by, which is seldom in a router: until then its memory would grow."""
    for _ in range(3):
        assert router.post(path, body).status_code == status
    assert garbage() == Counter()


def test_a_hundred_workers_that_come_and_go_leave_nothing(redis_server, start_worker, monkeypatch):
    monkeypatch.setattr(health, "KEPT_S", 0.0)
    monkeypatch.setattr(redis_state, "SWEEP_PAUSE_S", 0.0)
    staying = start_worker("stays", lease_s=LEASE_S)

    async def scenario() -> None:
        async with running(redis_server.url, 1, lease_s=LEASE_S) as service:
            metrics = RouterMetrics(service, "m")
            await serve(service)
            before = entries(service)  # what is still to be written to Redis included
            for batch in range(BATCHES):
                await come_and_go(service, lambda number, batch=batch: worker(start_worker, batch, number))
            assert service.counters()["workers_lost"] and service.counters()["workers_refused"]
            assert service.counters()["workers_broken"]
            with redis_server.client() as client:
                await until(lambda: len(service.loads()) == 1 and entries(service) <= before and not mentions(client))
            assert GONE not in metrics.scrape().text().decode()
            assert len(staying.peers) == 1

    play(scenario())


def worker(start_worker: Callable[..., FakeWorker], batch: int, number: int) -> FakeWorker:
    """Of every kind: prefill and decode workers, of another model, and some that fail."""
    role, fingerprint = ("prefill" if number % 3 == 0 else "decode"), ("g" if number % 5 == 1 else "f")
    one = start_worker(f"{GONE}{batch}-{number}", role, lease_s=LEASE_S, fingerprint=fingerprint)
    one.fails = "internal_error" if number % 5 == 2 else ""
    return one


async def come_and_go(service: RouterService, start: Callable[[int], FakeWorker]) -> None:
    """Some of them serve, some leave in order, the others die; a request that is cut off with them is cancelled."""
    workers = [start(number) for number in range(WORKERS)]
    fitting = sum(one.info.fingerprint == "f" for one in workers)
    await until(lambda: len(service.loads()) == 1 + fitting)
    await serve(service)
    for one in workers:
        one.limit = 0  # what comes from now on is not answered
    cut = [await send(service, request(f"cut-{number}")) for number in range(WORKERS)]
    await asyncio.gather(*(asyncio.to_thread(one.kill if i % 4 == 1 else one.close) for i, one in enumerate(workers)))
    for sink in cut:
        service.cancel(sink.request.request_id, 0)
    await until(lambda: len(service.loads()) == 1)


async def serve(service: RouterService) -> None:
    await ended(*[await send(service, request(f"served-{number}", tokens=3)) for number in range(WORKERS)])


def entries(service: RouterService) -> int:
    """How many things there are in all containers that the service reaches, itself or through objects of ours."""
    count, seen, ahead = 0, set[int](), deque[Any]([service])
    while ahead:
        one = ahead.popleft()
        if id(one) in seen or isinstance(one, (type, types.ModuleType, types.FunctionType, asyncio.AbstractEventLoop)):
            continue
        seen.add(id(one))
        if isinstance(one, (dict, list, set, deque)):
            count += len(one)
        elif not (isinstance(one, (tuple, types.MethodType)) or type(one).__module__.startswith("penstock.")):
            continue
        ahead.extend(gc.get_referents(one))
    return count


def mentions(client: redis.Redis) -> list[bytes]:
    """Keys in Redis whose name or contents name a worker that is gone."""
    read = {b"string": client.get, b"hash": client.hgetall, b"set": client.smembers}
    found = []
    for key in client.scan_iter():
        kind = client.type(key)
        if GONE.encode() in key or (kind in read and GONE.encode() in repr(read[kind](key)).encode()):
            found.append(key)
    return found
