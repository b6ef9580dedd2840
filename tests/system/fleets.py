"""Real fleets for system tests: every process of `penstock serve`, OpenAI clients, ledgers that must end at zero."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import redis
from openai import AsyncOpenAI

from penstock.child_process import ProcessSpec
from penstock.common.config import ServeConfig
from penstock.console import Console
from penstock.fleet import Fleet
from penstock.placement import Placement
from tests.conftest import free_port
from tests.forking import ForkedPython
from tests.two_hosts import Host

LEASE_S = 30.0  # on no busy machine is anybody silent for so long
SHORT_LEASE_S = 3.0  # for tests in which leases of the dead have to end
IDLE_S = 60.0
WITHIN_S = 60.0  # for an answer that takes milliseconds where nobody else is busy
EMPTY = ("running", "waiting", "held_pages", "promised_pages", "forgotten")
EMPTY_IF_THERE = ("requests", "admission", "handoffs", "reads", "lent_pages", "quarantined_pages")


@contextlib.contextmanager
def fleet(model: Path, *, console: Console | None = None, module: str = "penstock", **options: Any) -> Iterator[Fleet]:
    """A running fleet that must be idle, everywhere, when the block ends. `module`: what its workers run."""
    with FleetOf(module, fleet_config(model, **options), console=console) as running:
        yield running
        assert_idle(running)


class FleetOf(Fleet):
    """A fleet whose workers run a module that changes something in `penstock`."""

    def __init__(self, module: str, config: ServeConfig, *, console: Console | None = None) -> None:
        self._module = module
        super().__init__(config, console=console)

    def _worker_spec(self, placement: Placement) -> ProcessSpec:
        spec = super()._worker_spec(placement)
        return replace(spec, command=tuple(self._module if part == "penstock" else part for part in spec.command))


def fleet_config(model: Path, **options: Any) -> ServeConfig:
    """A fleet as tests want it, unless `options` say otherwise."""
    values: dict[str, Any] = {"device": "cpu", "lease_s": LEASE_S, "drain_s": 5.0, "served_model_name": ("tiny",)}
    values |= {"kv_cache_memory_bytes": 16 << 20, "block_size": 4, "port": 0, **options}
    return ServeConfig(model=str(model), **values)


def ledgers(running: Fleet) -> dict[str, dict[str, Any]]:
    """Each worker's /debug/ledger, which also verifies its page ledger; without those that do not answer now."""
    found = {}
    for worker_id, url in running.status_urls().items():
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(f"{url}/debug/ledger", timeout=WITHIN_S) as answer,
        ):
            found[worker_id] = json.load(answer)
    return found


def assert_idle(running: Fleet, seconds: float = IDLE_S) -> None:
    """Every page, promise, loan, request and reservation is zero; waits for leases of the dead to end."""
    deadline = time.monotonic() + seconds
    while True:
        state = ledgers(running)
        rest = {
            worker_id: {name: ledger.get(name, 0) for name in EMPTY + EMPTY_IF_THERE if ledger.get(name, 0)}
            for worker_id, ledger in state.items()
        }
        reserved = None  # Redis is being started again
        with contextlib.suppress(redis.ConnectionError):
            reserved = reservations(running)
        if len(state) == len(running.placements) and not any(rest.values()) and reserved == {}:
            assert all(name in ledger for ledger in state.values() for name in EMPTY)
            return
        assert time.monotonic() < deadline, f"not idle: {rest}, reserved {reserved}, workers {sorted(state)}"
        time.sleep(0.1)


def reservations(running: Fleet) -> dict[str, int]:
    """Load that routers have reserved in Redis and not given back."""
    return reservations_in(running.config.redis_url, running.config.namespace)


def reservations_in(redis_url: str, namespace: str = "penstock") -> dict[str, int]:
    """The same, without a launcher."""
    client = redis.Redis.from_url(redis_url, decode_responses=True)
    try:
        hashes = [client.hgetall(key) for key in client.scan_iter(f"{namespace}:load:*")]
    finally:
        client.close()
    return {worker: int(tokens) for load in hashes for worker, tokens in load.items() if int(tokens)}


def metric(running: Fleet, name: str, workers: str = "") -> float:
    """A metric of the workers (whose ids begin so), summed. From themselves: the router's copy is as old as the last
    heartbeat. As of now: a worker tells its ledger when it has counted what its last turn did."""
    ledgers(running)
    lines: list[str] = []
    for url in [url for worker_id, url in running.status_urls().items() if worker_id.startswith(workers)]:
        with urllib.request.urlopen(f"{url}/metrics", timeout=WITHIN_S) as answer:
            lines += answer.read().decode().splitlines()
    found = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")]
    assert found, f"no worker has the metric {name}"
    return sum(found)


def router_metric(url: str, name: str) -> float:
    """A metric of the router, summed over its labels."""
    lines = httpx.get(f"{url}/metrics", timeout=WITHIN_S).text.splitlines()
    found = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{"))]
    assert found, f"the router has no metric {name}"
    return sum(found)


async def wait_for(running: Fleet, worker_id: str, seconds: float = 60.0, /, **wanted: int) -> None:
    """Poll a worker's ledger until these fields have these values."""
    deadline = time.monotonic() + seconds
    while True:
        ledger = (await asyncio.to_thread(ledgers, running)).get(worker_id, {})
        if ledger and all(ledger.get(name, 0) == value for name, value in wanted.items()):
            return
        assert time.monotonic() < deadline, f"{worker_id}: wanted {wanted}, got {ledger}"
        await asyncio.sleep(0.01)


def wait_restarted(running: Fleet, name: str, old_pid: int, seconds: float = 60.0) -> None:
    """Until the supervisor has replaced a process and everything is ready again."""
    deadline = time.monotonic() + seconds
    while running.group.pids().get(name, old_pid) == old_pid or not running.group.ready:
        assert time.monotonic() < deadline, f"{name} was not restarted"
        time.sleep(0.05)


@contextlib.contextmanager
def router(redis_url: str, model: Path, *, status: int = 200, on: Host | None = None, **flags: object) -> Iterator[str]:
    """A `penstock router` without a launcher, on this host or another; yields its URL once it has a decode worker: once
    /health has `status`."""
    host, port = on.address if on else "127.0.0.1", free_port()
    values = {"port": port, "redis_url": redis_url, "lease_s": LEASE_S, "served_model_name": "tiny", "drain_s": 5}
    values["host"] = host
    arguments = [
        part for name, value in (values | flags).items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    inside = on.inside if on else ()
    process = ForkedPython([*inside, sys.executable, "-m", "penstock", "router", str(model), *arguments])
    url = f"http://{host}:{port}"
    try:
        deadline = time.monotonic() + 60
        while _health(url) != status:
            assert process.poll() is None and time.monotonic() < deadline, "the router does not get ready"
            time.sleep(0.05)
        yield url
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def _health(url: str) -> int:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5).status_code
    return 0


def open_client(url: str, timeout_s: float = 60.0) -> AsyncOpenAI:
    """An OpenAI client that does not try again by itself; use as an async context manager."""
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout_s)


async def complete(
    client: AsyncOpenAI, prompt: Sequence[int], max_tokens: int, *, stream: bool = False, **fields: Any
) -> list[int]:
    """Token ids of one completion of token ids."""
    extra = {"return_token_ids": True, "ignore_eos": True, **fields.pop("extra_body", {})}
    values = {"temperature": 0.0, "max_tokens": max_tokens, "extra_body": extra, **fields}
    if not stream:
        answer = await client.completions.create(model="tiny", prompt=list(prompt), **values)
        return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]
    tokens: list[int] = []
    async for chunk in await client.completions.create(model="tiny", prompt=list(prompt), stream=True, **values):
        tokens += chunk.choices[0].token_ids
    return tokens


def complete_all(
    running: Fleet | str,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    concurrency: int = 16,
    spread_s: float = 0.5,
    arrivals: int = 0,
    **fields: Any,
) -> list[list[int]]:
    """All prompts at random times, at most `concurrency` at once, every other one streamed; answers in order."""
    url = running if isinstance(running, str) else running.url

    async def run() -> list[list[int]]:
        chooser = random.Random(arrivals)
        slots = asyncio.Semaphore(concurrency)
        async with open_client(url, 120) as client:

            async def one(index: int, delay_s: float) -> list[int]:
                await asyncio.sleep(delay_s)
                async with slots:
                    return await complete(client, prompts[index], max_tokens, stream=index % 2 == 0, **fields)

            delays = [chooser.uniform(0, spread_s) for _ in prompts]
            return list(await asyncio.gather(*(one(i, delay) for i, delay in enumerate(delays))))

    return asyncio.run(run())
