"""A real router has a prefix fetched: its holder has no slot, and reading it costs less than computing it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import redis

from penstock.fleet import Fleet
from tests.index_view import index_view
from tests.system.fleets import complete, fleet, ledgers, metric, open_client, router_metric
from tests.tiny_models import make_checkpoint, reference_tokens

NEW_TOKENS = 8
PAGE = 4
PREFIX = [3 + i * i % 59 for i in range(600)]

pytestmark = pytest.mark.system


def test_the_next_request_is_served_beside_the_busy_holder_of_its_prefix(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path / "model", max_position_embeddings=4096)
    prompts = [[*PREFIX, 5, 6, 7], [*PREFIX, 9, 8]]
    expected = reference_tokens(path, prompts[1:], NEW_TOKENS)
    with fleet(path, decode_workers=2, cpu_threads=1, max_num_seqs=1, module="tests.workers.patient") as running:
        assert asyncio.run(_second_of(running, prompts)) == expected[0]
        assert metric(running, "penstock:fetched_tokens_total") == len(PREFIX) // PAGE * PAGE
        assert metric(running, "penstock:fetches_total") == 1
        assert metric(running, "penstock:fetch_failures_total") == 0
        assert metric(running, "vllm:prompt_tokens_total") == len(prompts[0]) + len(prompts[1]) - len(PREFIX)
        assert router_metric(running.url, "penstock:retries_total") == 0


async def _second_of(running: Fleet, prompts: list[list[int]]) -> list[int]:
    """The answer to the second one: it comes when the pages of the first one, which runs on, are known."""
    async with open_client(running.url, 120) as client:
        first = asyncio.create_task(complete(client, prompts[0], 3000, stream=True))
        await asyncio.to_thread(_wait_indexed, running, len(PREFIX) // PAGE)
        second = await complete(client, prompts[1], NEW_TOKENS)
        busy = [ledger["running"] for ledger in (await asyncio.to_thread(ledgers, running)).values()]
        assert sorted(busy) == [0, 1]
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    return second


def _wait_indexed(running: Fleet, pages: int) -> None:
    """Until a worker's pages of the prefix are in the index, whoever it is."""
    client = redis.Redis.from_url(running.config.redis_url)
    try:
        while max(map(len, index_view(client, running.config.namespace).values()), default=0) < pages:
            time.sleep(0.02)
    finally:
        client.close()
