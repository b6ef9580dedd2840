"""Failures other than a killed worker (test_chaos.py): clients, Redis and routers that go, workers that hang or drain.

Clients that stay get exactly Hugging Face's tokens or an OpenAI error, in time; and nobody holds anything afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI, BadRequestError, InternalServerError

from penstock.fleet import Fleet
from tests.conftest import RedisServer
from tests.index_view import index_view
from tests.system.fleets import (
    SHORT_LEASE_S,
    assert_idle,
    complete,
    complete_all,
    fleet,
    ledgers,
    metric,
    open_client,
    reservations,
    router,
    router_metric,
    wait_for,
    wait_restarted,
)
from tests.tiny_models import make_checkpoint, random_prompts, reference_tokens
from tests.workers.worker_processes import WorkerProcess, workers

NEW_TOKENS = 120
CONTEXT = 8192
ROOM = 32 << 20  # bytes of KV: over 40,000 tokens
FOREVER = 6000  # tokens: more than any test waits for
WITHIN_S = 60.0  # for what takes a second where nobody else is busy
HANG_ANSWERED_S = 120.0  # the bus notices after 5 s at most; the rest is for busy machines
QUEUE_TIMEOUT_S = 10  # so long the router waits for a worker that may be restarting
DEAD_ANSWERED_S = QUEUE_TIMEOUT_S + 50.0
POOL = 4 << 20  # bytes: 5456 tokens
BLOCKS = 2000  # tokens that a long prompt may get there: seconds
LATE_S = 3.0  # of waiting for room: longer than it takes to see that somebody does, shorter than the bus's patience
# Round-robin hands every long prompt off, whatever that costs on a busy machine.
PAIR = {"prefill_workers": 1, "decode_workers": 1, "cpu_threads": 1, "routing_policy": "round-robin"}

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("failures"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """The last one keeps a prefill worker, 8 tokens a step, busy for so long that it can be caught at it."""
    return random_prompts([3, 17, 64, 40, 9, 600], seed=8)


@pytest.fixture(scope="module")
def expected(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    return reference_tokens(model, prompts, NEW_TOKENS)


# ---------------------------------------------------------------- clients, Redis and routers that go


def test_clients_redis_and_router_that_go(
    model: Path, prompts: list[list[int]], expected: list[list[int]], own_redis: RedisServer
) -> None:
    """One fleet (starting it is what costs time), one failure after the other."""
    options = {**PAIR, "lease_s": SHORT_LEASE_S, "max_num_batched_tokens": 8, "kv_cache_memory_bytes": ROOM}
    with fleet(model, redis_url=own_redis.url, **options) as running:
        asyncio.run(_clients_leave(running, prompts, expected))
        asyncio.run(_redis_goes(running, own_redis, prompts, expected))
        asyncio.run(_the_router_dies(running, prompts))
        assert complete_all(running, prompts, NEW_TOKENS) == expected


async def _clients_leave(running: Fleet, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """While they are prefilled, and while they are decoded; their neighbours' answers are not disturbed."""
    async with open_client(running.url) as client:
        for stream in (True, False):
            long = random_prompts([7000], seed=int(stream))[0]
            for prompt, worker, tokens in ((long, "prefill-0", 1000), (prompts[1], "decode-0", FOREVER)):
                async with _leaves(client, prompt, stream, tokens):
                    await wait_for(running, worker, running=1)
                    neighbours = _ask_all(client, prompts[:3], salt=f"{worker}-{stream}")
                    await asyncio.wait(neighbours, timeout=0.05)
                await wait_for(running, "prefill-0", running=0, waiting=0, held_pages=0, lent_pages=0)
                assert await asyncio.gather(*neighbours) == expected[:3]
                await asyncio.to_thread(assert_idle, running)
    assert metric(running, "vllm:generation_tokens_total") < 2 * FOREVER  # nobody computed on for those who left


@contextlib.asynccontextmanager
async def _leaves(
    client: AsyncOpenAI, prompt: list[int], stream: bool, max_tokens: int = FOREVER
) -> AsyncIterator[None]:
    """A client that hangs up when the block ends, before it has its answer."""
    task = asyncio.create_task(complete(client, prompt, max_tokens, stream=stream))
    try:
        yield
    finally:
        left = task.cancel()
        answer = (await asyncio.gather(task, return_exceptions=True))[0]
        assert left, f"the answer came before the client left: {answer!r}"


async def _redis_goes(
    running: Fleet, server: RedisServer, prompts: list[list[int]], expected: list[list[int]], outage_s: float = 10.0
) -> None:
    async with open_client(running.url) as client:

        async def keep_asking(index: int) -> None:
            answers = 0
            while time.monotonic() < back_at or answers < 2:
                stream = answers % 2 == 0
                assert await complete(client, prompts[index], NEW_TOKENS, stream=stream) == expected[index]
                answers += 1

        back_at = time.monotonic() + outage_s
        asking = [asyncio.create_task(keep_asking(index)) for index in range(3)]
        await wait_for(running, "decode-0", running=3)
        server.stop()
        await asyncio.gather(*asking)
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(_wait_announced, running, server)
        async with _leaves(client, prompts[0], True):
            deadline = time.monotonic() + WITHIN_S
            while not await asyncio.to_thread(reservations, running):
                assert time.monotonic() < deadline, "no reservation arrives in the new Redis"
    await asyncio.to_thread(assert_idle, running)


def _wait_announced(running: Fleet, server: RedisServer) -> None:
    """Both workers and their cached pages are in Redis."""
    deadline = time.monotonic() + WITHIN_S
    with contextlib.closing(server.client()) as client:
        while True:
            view = index_view(client, running.config.namespace)
            pages = [len(view.get(worker.incarnation, ())) for worker in running.workers().values()]
            if len(pages) == 2 and all(pages):
                return
            assert time.monotonic() < deadline, f"announced pages: {pages}"
            time.sleep(0.05)


async def _the_router_dies(running: Fleet, prompts: list[list[int]]) -> None:
    pid = running.group.pids()["router"]
    before = metric(running, "vllm:generation_tokens_total")
    async with open_client(running.url) as client:
        asking = [
            asyncio.create_task(complete(client, prompt, FOREVER, stream=index < 2))
            for index, prompt in enumerate(prompts[:4])
        ]
        await wait_for(running, "decode-0", running=4)
        running.kill("router")
        answers = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), WITHIN_S)
    assert all(isinstance(answer, (APIConnectionError, httpx.TransportError)) for answer in answers), answers
    await asyncio.to_thread(assert_idle, running)
    assert metric(running, "vllm:generation_tokens_total") - before < 4 * FOREVER
    await asyncio.to_thread(wait_restarted, running, "router", pid)


# ---------------------------------------------------------------- no room


def test_no_room(model: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """A pool for one long prompt at a time: the others wait, in order, leave, or are sent away in time."""
    with fleet(model, kv_cache_memory_bytes=POOL, max_model_len=4800, cpu_threads=1) as running:
        asyncio.run(_too_long(running))
        asyncio.run(_waits(running, prompts, expected))
        with router(running.config.redis_url, model, queue_timeout_s=LATE_S) as impatient:
            asyncio.run(_is_too_late(running, impatient))


async def _too_long(running: Fleet) -> None:
    async with open_client(running.url) as client:
        for prompt_tokens, max_tokens, numbers in ((4900, 1, ("4800", "4900")), (4000, 801, ("4800", "4801"))):
            for stream in (True, False):
                with pytest.raises(BadRequestError) as refused:
                    await complete(client, random_prompts([prompt_tokens])[0], max_tokens, stream=stream)
                assert refused.value.code == "context_length_exceeded"
                assert refused.value.type == "invalid_request_error"
                assert all(number in refused.value.message for number in numbers)
    await asyncio.to_thread(assert_idle, running)


async def _waits(running: Fleet, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """A long request holds most of the pool. Each other long one waits for it; short ones behind wait as well."""
    blocker, gone, *long = random_prompts([2800, 2801, 2802, 2803, 2804], seed=3)
    wanted = await asyncio.to_thread(reference_tokens, Path(running.config.model), long, 8)
    worker = "decode-0"
    async with open_client(running.url) as client:
        order: list[int] = []

        async def wait_in_line(index: int) -> None:
            assert await complete(client, long[index], 8, stream=index % 2 == 0) == wanted[index]
            order.append(index)

        for stream in (True, False):
            async with _leaves(client, blocker, True, BLOCKS):
                await wait_for(running, worker, requests=1, running=1)
                async with _leaves(client, gone, stream, 100):
                    await wait_for(running, worker, requests=1, admission=1)
                    neighbour = asyncio.create_task(complete(client, prompts[0], 8))
                    await wait_for(running, worker, requests=1, admission=2)
                await wait_for(running, worker, admission=0)  # who left holds up nobody
                assert await neighbour == expected[0][:8]
            await asyncio.to_thread(assert_idle, running)

        async with _leaves(client, blocker, True, BLOCKS):
            await wait_for(running, worker, requests=1, running=1)
            waiting = []
            for index in range(len(long)):
                waiting.append(asyncio.create_task(wait_in_line(index)))
                await wait_for(running, worker, requests=1, admission=index + 1)
        await asyncio.gather(*waiting)
        assert order == sorted(order)


async def _is_too_late(running: Fleet, impatient: str) -> None:
    """Who comes by a router with little patience is sent away; meanwhile the worker stands still, and so does whom it
    serves."""
    blocker, late = random_prompts([2800, 2801], seed=4)
    worker = "decode-0"
    async with (
        open_client(impatient) as other,
        open_client(running.url) as client,
        _leaves(client, blocker, True, BLOCKS),
    ):
        await wait_for(running, worker, requests=1, running=1)
        waiting = [asyncio.create_task(complete(other, late, 8, stream=stream)) for stream in (True, False)]
        await wait_for(running, worker, requests=1, admission=2)
        running.kill(worker, signal.SIGSTOP)
        await asyncio.sleep(LATE_S + 0.1)
        running.kill(worker, signal.SIGCONT)
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, InternalServerError), error
            assert error.status_code == 503
            assert error.body == {
                "message": "no room within 3 s", "type": "server_error", "param": None, "code": "queue_timeout"
            }  # fmt: skip
            assert error.response.headers["retry-after"] == "1"


# ---------------------------------------------------------------- workers that hang or leave


def test_workers_that_hang_or_drain(model: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Stopped for longer than the bus waits for a sign of life, then continued: they come back and hold nothing."""
    options = {**PAIR, "decode_workers": 2, "max_num_batched_tokens": 8, "kv_cache_memory_bytes": ROOM, "drain_s": 0.05}
    options["lease_s"] = SHORT_LEASE_S
    with fleet(model, **options) as running:
        asyncio.run(_hang(running, ("decode-0", "prefill-0"), prompts, expected))
        assert router_metric(running.url, "penstock:retries_total") > 0
        assert metric(running, "penstock:handoff_failures_total") > 0
        went_on = _went_on(running)
        while _went_on(running) == went_on:  # what runs there may end just before the signal takes effect
            asyncio.run(_drains(running, prompts, expected))
        assert complete_all(running, prompts, NEW_TOKENS) == expected


async def _hang(running: Fleet, hanging: tuple[str, ...], prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Requests that are there when they stop, and requests that come meanwhile, are answered while they hang."""
    pids = running.worker_pids()
    async with open_client(running.url, HANG_ANSWERED_S) as client:
        asked: list[asyncio.Task[list[int]]] = []
        deadline = time.monotonic() + WITHIN_S
        while True:  # until those that are to hang are seen at work
            if all(task.done() for task in asked):
                asked += _ask_all(client, prompts, salt=f"before-{len(asked)}")
            state = await asyncio.to_thread(ledgers, running)
            if all(state[worker]["running"] for worker in hanging):
                break
            assert time.monotonic() < deadline, state
        for worker in hanging:
            running.kill(worker, signal.SIGSTOP)
        try:
            asked += _ask_all(client, prompts, salt="meanwhile")
            assert await asyncio.gather(*asked) == expected * (len(asked) // len(prompts))
            assert await complete(client, prompts[0], NEW_TOKENS) == expected[0]  # nobody is sent there any more
        finally:
            for worker in hanging:
                running.kill(worker, signal.SIGCONT)
    await asyncio.to_thread(assert_idle, running)
    assert running.worker_pids() == pids
    deadline = time.monotonic() + WITHIN_S
    while not _all_linked(running):
        assert time.monotonic() < deadline, "the router has not found them again"
        await asyncio.sleep(0.05)


def _all_linked(running: Fleet) -> bool:
    linked = httpx.get(f"{running.url}/health", timeout=60).json().get("workers")
    return bool(linked == {"prefill": running.config.prefill_workers, "decode": running.config.decode_workers})


def _ask_all(client: AsyncOpenAI, prompts: list[list[int]], salt: str) -> list[asyncio.Task[list[int]]]:
    """Ask for all prompts now. No prefix that was computed before counts, so every longer one is handed off."""
    return [
        asyncio.create_task(
            complete(client, prompt, NEW_TOKENS, stream=index % 2 == 0, extra_body={"cache_salt": f"{salt}-{index}"})
        )
        for index, prompt in enumerate(prompts)
    ]


async def _wait_linked(running: Fleet, **wanted: int) -> None:
    """Until the router has links to so many workers again."""
    deadline = time.monotonic() + WITHIN_S
    async with httpx.AsyncClient(timeout=60) as client:
        while (found := (await client.get(f"{running.url}/health")).json().get("workers")) != wanted:
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)


def _went_on(running: Fleet) -> float:
    """Attempts that went on at another worker: from its first token, or with the pages of the one that left."""
    return sum(router_metric(running.url, f"penstock:{name}_total") for name in ("retries", "moves"))


async def _drains(running: Fleet, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """SIGTERM while streams run: what it cannot finish within `drain_s` goes on at the other worker."""
    pids = running.worker_pids()
    async with open_client(running.url) as client:
        asked = [asyncio.create_task(complete(client, prompt, NEW_TOKENS, stream=True)) for prompt in prompts * 2]
        leaving = ""
        while not leaving and not all(task.done() for task in asked):
            state = await asyncio.to_thread(ledgers, running)
            leaving = next((name for name in ("decode-0", "decode-1") if state.get(name, {}).get("running")), "")
        if leaving:
            running.kill(leaving, signal.SIGTERM)
        assert await asyncio.gather(*asked) == expected * 2
    if leaving:
        await asyncio.to_thread(wait_restarted, running, leaving, pids[leaving])


# ---------------------------------------------------------------- cut connections, and nobody left


def test_cut_connections_and_nobody_left(
    model: Path, prompts: list[list[int]], expected: list[list[int]], own_redis: RedisServer
) -> None:
    """Both ends of a cut connection live on. Without a launcher, so that a dead worker stays dead at the end."""
    roles = {"prefill-0": "prefill", "decode-0": "decode"}
    flags = {"max_num_batched_tokens": 8, "block_size": 4, "kv_cache_memory_bytes": ROOM, "lease_s": SHORT_LEASE_S}
    with (
        workers(own_redis.url, model, roles, module="tests.system.cutting", **flags) as started,
        router(own_redis.url, model, queue_timeout_s=QUEUE_TIMEOUT_S, routing_policy="round-robin") as url,
    ):
        prefill, decode = started["prefill-0"], started["decode-0"]
        while not decode.metric("penstock:handoff_failures_total"):  # what was seen there may end before the cut
            asyncio.run(_cut_under_load(url, prefill, "handoffs", 1, prompts, expected))
        retries = router_metric(url, "penstock:retries_total")
        while router_metric(url, "penstock:retries_total") == retries:
            asyncio.run(_cut_under_load(url, decode, "running", 2, prompts, expected))
        for worker in started.values():
            worker.assert_idle()
        asyncio.run(_the_last_worker_dies(url, decode, prompts))
        prefill.assert_idle()


async def _cut_under_load(
    url: str, worker: WorkerProcess, busy: str, cuts: int, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Cut all connections of a worker while its ledger has requests in `busy`."""
    async with open_client(url) as client:
        asked: list[asyncio.Task[list[int]]] = []
        for _ in range(cuts):
            while not (await asyncio.to_thread(worker.ledger))[busy]:
                if all(task.done() for task in asked):
                    asked += _ask_all(client, prompts * 2, salt=f"{worker.worker_id}-{time.monotonic()}")
            worker.kill(signal.SIGUSR1)
            await asyncio.sleep(0.2)
        assert await asyncio.gather(*asked) == expected * (len(asked) // len(expected))


async def _to_the_end(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


async def _the_last_worker_dies(url: str, decode: WorkerProcess, prompts: list[list[int]]) -> None:
    """All requests get a typed 503 in a bounded time; a stream that has begun gets it as an event."""
    async with open_client(url) as client:
        begun = await client.completions.create(
            model="tiny", prompt=prompts[0], max_tokens=FOREVER, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(begun)
        asked: list[asyncio.Task[object]] = [
            asyncio.create_task(_to_the_end(begun)),
            asyncio.create_task(complete(client, prompts[1], FOREVER)),
        ]
        while decode.ledger()["running"] < 2:
            await asyncio.sleep(0.01)
        decode.kill()
        asked.append(asyncio.create_task(complete(client, prompts[2], 4)))
        async with httpx.AsyncClient(timeout=60) as plain:
            while (await plain.get(f"{url}/health")).status_code == 200:
                await asyncio.sleep(0.05)
        asked += [asyncio.create_task(complete(client, prompts[3], 4, stream=stream)) for stream in (True, False)]
        errors = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), DEAD_ANSWERED_S)
    for error in errors:
        assert isinstance(error, APIError), error
        assert isinstance(error.body, dict) and error.body["code"] == "unavailable", error.body
        assert error.body["type"] == "server_error"
    assert not isinstance(errors[0], APIStatusError)  # its stream had begun
    assert {error.status_code for error in errors[1:]} == {503}
