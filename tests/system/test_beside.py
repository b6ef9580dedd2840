"""A real prefill worker is held up: the decode worker takes prompts, in chunks beside what it decodes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from penstock.fleet import Fleet
from tests.stopping import stop_process
from tests.system.fleets import WITHIN_S, complete, fleet, metric, open_client, router_metric
from tests.tiny_models import random_prompts, reference_tokens

NEW_TOKENS = 6
AT_PREFILL = "penstock:prompts_at_prefill_workers_total"

pytestmark = pytest.mark.system


def test_the_decode_worker_takes_prompts_while_the_prefill_worker_is_held_up(checkpoints: dict[str, Path]) -> None:
    """So few steps measure no rates: those of the defaults decide, whatever the machine."""
    prompts = random_prompts([1800, 60, 61, 90, 63], seed=11)
    expected = reference_tokens(checkpoints["llama"], prompts, NEW_TOKENS)
    options = {"prefill_workers": 1, "decode_workers": 1, "cpu_threads": 1, "mixed_chunk_tokens": 32}
    with fleet(checkpoints["llama"], **options) as running:
        assert asyncio.run(_answers(running, prompts)) == expected
        router = httpx.get(f"{running.url}/fleet", timeout=WITHIN_S).json()["router"]
        # On a machine so slow that the prefill worker was given up, its prompt was sent a second time.
        assert router["prompts_at_prefill_workers"] == router_metric(running.url, AT_PREFILL) >= 1
        assert router["prompts_at_decode_workers"] >= len(prompts) - 1
        assert metric(running, "vllm:prompt_tokens_total", "decode") >= sum(map(len, prompts[1:]))


async def _answers(running: Fleet, prompts: list[list[int]]) -> list[list[int]]:
    """The first prompt waits at the prefill worker until the others have been answered."""
    pid = running.worker_pids()["prefill-0"]
    async with open_client(running.url, WITHIN_S) as client:
        stop_process(pid)
        try:
            first = asyncio.create_task(complete(client, prompts[0], NEW_TOKENS))
            deadline = time.monotonic() + WITHIN_S
            while not router_metric(running.url, AT_PREFILL):
                assert time.monotonic() < deadline, "the first prompt goes to the prefill worker"
                await asyncio.sleep(0.01)
            others = [complete(client, prompt, NEW_TOKENS, stream=n % 2 == 0) for n, prompt in enumerate(prompts[1:])]
            answers = await asyncio.gather(*others)
        finally:
            os.kill(pid, signal.SIGCONT)
        return [await first, *answers]
