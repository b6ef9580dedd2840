"""A busy worker drains: its requests go on elsewhere with their pages, and the streams do not notice."""

from __future__ import annotations

import asyncio
import signal
import urllib.request
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.fleet import Fleet
from tests.system.fleets import (
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

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


def test_a_drained_worker_gives_its_requests_away_with_their_pages(tmp_path: Path) -> None:
    """By command, then by signal; greedy streams, and one that draws with a seed and counts penalties."""
    path = make_checkpoint("llama", tmp_path / "model", max_position_embeddings=4096)
    prompts = random_prompts([40, 64, 33, 120], seed=41)
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    options = {"decode_workers": 2, "cpu_threads": 1, "max_num_batched_tokens": 32, "drain_s": 60.0}
    with fleet(path, **options) as running:
        drawn = asyncio.run(_draw(running, prompts[0]))
        asyncio.run(_drain_by_command(running, prompts, expected, drawn))
        asyncio.run(_drain_by_signal(running, prompts, expected))
        assert router_metric(running.url, "penstock:retries_total") == 0


async def _draw(running: Fleet, prompt: list[int]) -> list[int]:
    async with open_client(running.url) as client:
        return await complete(client, prompt, NEW_TOKENS, temperature=0.9, seed=7, presence_penalty=0.5)


async def _drain_by_command(
    running: Fleet, prompts: list[list[int]], expected: list[list[int]], drawn: list[int]
) -> None:
    async with open_client(running.url, 120) as client:
        streams = [asyncio.create_task(complete(client, p, NEW_TOKENS, stream=True)) for p in prompts]
        seeded = {"temperature": 0.9, "seed": 7, "presence_penalty": 0.5}
        streams.append(asyncio.create_task(complete(client, prompts[0], NEW_TOKENS, stream=True, **seeded)))
        leaving = await _busy(running, len(streams))
        other = next(name for name in running.worker_pids() if name != leaving)
        pid = running.worker_pids()[leaving]
        before = await asyncio.to_thread(_totals, running, other)
        assert await asyncio.to_thread(main, ["drain", leaving, "--url", running.url, "--timeout", "60"]) == 0
        answers = await asyncio.gather(*streams)
    assert answers == [*expected, drawn]
    totals = await asyncio.to_thread(_totals, running, other)
    moves = int(await asyncio.to_thread(router_metric, running.url, "penstock:moves_total"))
    assert moves > 0
    assert await asyncio.to_thread(router_metric, running.url, "penstock:workers_lost_total") == 0
    fetched, failed, computed = (totals[name] - before[name] for name in ("fetches", "fetch_failures", "prompt_tokens"))
    assert failed == 0 and 0 < fetched <= moves
    assert computed <= moves * PAGE  # each lacked what its last page held, and its last token had never been computed
    await asyncio.to_thread(wait_restarted, running, leaving, pid)
    await asyncio.to_thread(assert_idle, running)


async def _drain_by_signal(running: Fleet, prompts: list[list[int]], expected: list[list[int]]) -> None:
    async with open_client(running.url, 120) as client:
        streams = [asyncio.create_task(complete(client, p, NEW_TOKENS, stream=True)) for p in prompts]
        leaving = await _busy(running, len(streams))
        pid = running.worker_pids()[leaving]
        running.kill(leaving, signal.SIGTERM)
        assert await asyncio.gather(*streams) == expected
    await asyncio.to_thread(wait_restarted, running, leaving, pid)


async def _busy(running: Fleet, streams: int) -> str:
    """The worker with most requests, once all streams decode."""
    while True:
        found = {name: ledger["running"] for name, ledger in (await asyncio.to_thread(ledgers, running)).items()}
        if sum(found.values()) == streams and not await asyncio.to_thread(metric, running, "penstock:queued_tokens"):
            return max(found, key=lambda name: found[name])
        await asyncio.sleep(0.01)


def _totals(running: Fleet, worker_id: str) -> dict[str, int]:
    """A worker's counters, from itself: what a router knows is as old as the last heartbeat."""
    with urllib.request.urlopen(f"{running.status_urls()[worker_id]}/metrics", timeout=20) as answer:
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
