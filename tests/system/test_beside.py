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

NEW_TOKENS, LONG = 12, 60
CHUNK = 16
AT_PREFILL = "penstock:prompts_at_prefill_workers_total"

pytestmark = pytest.mark.system


def test_the_decode_worker_takes_prompts_while_the_prefill_worker_is_held_up(checkpoints: dict[str, Path]) -> None:
    """No rates are measured so early: those of the defaults decide, whatever the machine."""
    prompts = random_prompts([60, 60, 61, 90, 63], seed=11)
    lengths = [NEW_TOKENS, LONG, NEW_TOKENS, NEW_TOKENS, NEW_TOKENS]
    expected = [
        reference_tokens(checkpoints["llama"], [prompt], length)[0]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    options = {"prefill_workers": 1, "decode_workers": 1, "cpu_threads": 1, "mixed_chunk_tokens": CHUNK}
    with fleet(checkpoints["llama"], **options) as running:
        assert asyncio.run(_answers(running, prompts, lengths)) == expected
        router = httpx.get(f"{running.url}/fleet", timeout=WITHIN_S).json()["router"]
        # On a machine so slow that the prefill worker was given up, its prompt was sent a second time.
        assert router["prompts_at_prefill_workers"] == router_metric(running.url, AT_PREFILL) >= 1
        assert router["prompts_at_decode_workers"] >= len(prompts) - 1
        assert metric(running, "vllm:prompt_tokens_total", "decode") >= sum(map(len, prompts[1:]))


async def _answers(running: Fleet, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """The first prompt waits at the prefill worker for the others: a long one, and beside it the rest."""
    pid = running.worker_pids()["prefill-0"]
    async with open_client(running.url, WITHIN_S) as client:
        stop_process(pid)
        try:
            first = asyncio.create_task(complete(client, prompts[0], lengths[0]))
            deadline = time.monotonic() + WITHIN_S
            while not router_metric(running.url, AT_PREFILL):
                assert time.monotonic() < deadline, "the first prompt goes to the prefill worker"
                await asyncio.sleep(0.01)
            long = asyncio.create_task(complete(client, prompts[1], lengths[1], stream=True))
            rest = [await complete(client, prompts[n], lengths[n]) for n in range(2, len(prompts))]
            answers = [await long, *rest]
        finally:
            os.kill(pid, signal.SIGCONT)
        return [await first, *answers]
