"""A busy worker drains: its requests go on elsewhere with their pages, and the streams do not notice."""

from __future__ import annotations

import asyncio
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from penstock.cli import main
from penstock.fleet import Fleet
from tests.system.fleets import (
    WITHIN_S,
    assert_idle,
    complete,
    fleet,
    ledgers,
    metric,
    open_client,
    router_metric,
    wait_restarted,
)
from tests.tiny_models import make_checkpoint, random_prompts, reference_tokens

NEW_TOKENS = 400
PAGE = 4
POOL = 3 << 20  # bytes: 4092 tokens

pytestmark = pytest.mark.system


def test_a_drained_worker_gives_its_requests_away_with_their_pages(tmp_path: Path) -> None:
    """By command, then by signal; greedy streams, and one that draws with a seed and counts penalties."""
    path = make_checkpoint("llama", tmp_path / "model", max_position_embeddings=4096)
    prompts = random_prompts([40, 64, 33, 120], seed=41)
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    (large,) = random_prompts([1800], seed=42)
    options = {"decode_workers": 2, "cpu_threads": 1, "max_num_batched_tokens": 128, "drain_s": 60.0}
    options["kv_cache_memory_bytes"] = POOL
    # Who has just come back takes what the other one has no room for, whatever that one was given before.
    options |= {"slow_start_s": 0.0, "routing_policy": "least-load"}
    with fleet(path, module="tests.workers.patient", **options) as running:
        drawn = asyncio.run(_draw(running, prompts[0]))
        asyncio.run(_drain_by_command(running, prompts, expected, drawn))
        asyncio.run(_drain_by_signal(running, prompts, expected))
        asyncio.run(_drain_where_nobody_has_room(running, large, reference_tokens(path, [large], 200)[0]))
        assert router_metric(running.url, "penstock:retries_total") == 0


async def _draw(running: Fleet, prompt: list[int]) -> list[int]:
    async with open_client(running.url) as client:
        return await complete(client, prompt, NEW_TOKENS, temperature=0.9, seed=7, presence_penalty=0.5)


async def _drain_by_command(
    running: Fleet, prompts: list[list[int]], expected: list[list[int]], drawn: list[int]
) -> None:
    """Until some of what ran there has moved: all may end before the command gets there."""
    moves, attempt = 0, 0
    while not moves:
        attempt += 1
        async with open_client(running.url, 120) as client:
            salt = {"cache_salt": str(attempt)}  # nobody holds anything of them
            streams = _ask_all(client, prompts, extra_body=salt)
            seeded = {"temperature": 0.9, "seed": 7, "presence_penalty": 0.5, "extra_body": salt}
            streams += _ask_all(client, prompts[:1], **seeded)
            leaving = await _busy(running, streams)
            if leaving:
                other = next(name for name in running.worker_pids() if name != leaving)
                pid = running.worker_pids()[leaving]
                before = await asyncio.to_thread(_totals, running, other)
                assert await asyncio.to_thread(main, ["drain", leaving, "--url", running.url, "--timeout", "60"]) == 0
            assert await asyncio.gather(*streams) == [*expected, drawn]
        if leaving:
            totals = await asyncio.to_thread(_totals, running, other)
            moves = int(await asyncio.to_thread(router_metric, running.url, "penstock:moves_total"))
            fetched, failed, computed = (totals[k] - before[k] for k in ("fetches", "fetch_failures", "prompt_tokens"))
            assert failed == 0 and bool(moves) <= fetched <= moves
            assert computed <= moves  # the last token of each, which nobody had computed yet
            assert await asyncio.to_thread(router_metric, running.url, "penstock:workers_lost_total") == 0
            await asyncio.to_thread(wait_restarted, running, leaving, pid)
        await asyncio.to_thread(assert_idle, running)


async def _drain_by_signal(running: Fleet, prompts: list[list[int]], expected: list[list[int]]) -> None:
    leaving = ""
    while not leaving:
        async with open_client(running.url, 120) as client:
            streams = _ask_all(client, prompts)
            leaving = await _busy(running, streams)
            if leaving:
                pid = running.worker_pids()[leaving]
                running.kill(leaving, signal.SIGTERM)
            assert await asyncio.gather(*streams) == expected
    await asyncio.to_thread(wait_restarted, running, leaving, pid)


async def _drain_where_nobody_has_room(running: Fleet, prompt: list[int], expected: list[int]) -> None:
    """What does not fit into the other worker's pool, beside what is there, goes on where it is."""
    moves = await asyncio.to_thread(router_metric, running.url, "penstock:moves_total")
    async with open_client(running.url, 120) as client:
        blocker = asyncio.create_task(complete(client, random_prompts([2300], seed=43)[0], 1700, stream=True))
        full = await _at_work(running)
        stream = asyncio.create_task(complete(client, prompt, len(expected), stream=True))
        leaving = await _at_work(running, full)
        pid = running.worker_pids()[leaving]
        running.kill(leaving, signal.SIGTERM)
        assert await stream == expected
        assert not blocker.done()
        assert await asyncio.to_thread(router_metric, running.url, "penstock:moves_total") == moves
        blocker.cancel()
    await asyncio.to_thread(wait_restarted, running, leaving, pid)


async def _at_work(running: Fleet, but: str = "") -> str:
    """The worker, other than this one, at which something runs."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        for name, ledger in (await asyncio.to_thread(ledgers, running)).items():
            if ledger["running"] and name != but:
                return name
        assert time.monotonic() < deadline, "nothing runs"
        await asyncio.sleep(0.01)


def _ask_all(client: AsyncOpenAI, prompts: list[list[int]], **fields: Any) -> list[asyncio.Task[list[int]]]:
    return [asyncio.create_task(complete(client, p, NEW_TOKENS, stream=True, **fields)) for p in prompts]


async def _busy(running: Fleet, streams: list[asyncio.Task[list[int]]]) -> str:
    """The worker with most requests, once all streams decode; none if one has ended before that was seen."""
    while not any(stream.done() for stream in streams):
        found = {name: ledger["running"] for name, ledger in (await asyncio.to_thread(ledgers, running)).items()}
        queued = await asyncio.to_thread(metric, running, "penstock:queued_tokens")
        if sum(found.values()) == len(streams) and not queued:
            return max(found, key=lambda name: found[name])
        await asyncio.sleep(0.01)
    return ""


def _totals(running: Fleet, worker_id: str) -> dict[str, int]:
    """A worker's counters, from itself: what a router knows is as old as the last heartbeat."""
    ledgers(running)  # told when all has been counted
    with urllib.request.urlopen(f"{running.status_urls()[worker_id]}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for name, start, label in (
        ("fetches", "penstock:fetches_total{", ""),
        ("fetch_failures", "penstock:fetch_failures_total{", ""),
        ("prompt_tokens", "vllm:prompt_tokens_by_source_total{", 'source="local_compute"'),
    ):
        (value,) = (line.rpartition(" ")[2] for line in lines if line.startswith(start) and label in line)
        found[name] = int(float(value))
    return found
