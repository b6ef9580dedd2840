"""Prefill and decode worker as real processes: pages move, tokens equal Hugging Face's, nothing is left behind."""

from __future__ import annotations

import random
import time
from pathlib import Path

import msgspec
import pytest

from penstock.common.messages import GenerateRequest, Submit
from penstock.common.sampling import SamplingParams
from penstock.tap import Tap
from tests.conftest import RedisServer
from tests.tiny_models import random_prompts, reference_tokens
from tests.workers.worker_processes import RouterDouble, WorkerProcess, workers

NEW_TOKENS = 12
CHOICES = 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, seed=1)
PAIR = {"prefill-0": "prefill", "decode-0": "decode"}


@pytest.mark.system
@pytest.mark.parametrize(
    ("transport", "module"),
    [("shm", "penstock"), ("nixl", "penstock"), ("tcp", "penstock"), ("shm", "tests.workers.late")],
)
def test_handed_off_tokens_equal_hugging_face(
    checkpoints: dict[str, Path], redis_server: RedisServer, transport: str, module: str
) -> None:
    path = checkpoints["qwen3"]
    chooser = random.Random(3)
    prompts = random_prompts([chooser.choice((1, 3, 9, 17, 40, 64, 90)) for _ in range(24)])
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    flags = {"block_size": 4, "max_num_batched_tokens": 16, "kv_cache_memory_bytes": "8MiB"}
    with workers(redis_server.url, path, PAIR, module=module, kv_transport=transport, **flags) as fleet:
        prefill, decode = fleet["prefill-0"], fleet["decode-0"]
        assert prefill.info is not None and decode.info is not None
        assert prefill.info.transports == {transport: b""}  # Redis knows the name; how to read pages, the bus
        with RouterDouble(decode.info, prefill.info) as router:
            router.wait_connected()
            for i, prompt in enumerate(prompts):
                request = GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=GREEDY)
                router.submit(decode.info, Submit(request=request, prefill=prefill.info))
            router.collect()
            assert [router.answers[str(i), 0].tokens for i in range(len(prompts))] == expected
            assert {answer.finish.reason for answer in router.answers.values() if answer.finish} == {"length"}
            moved = sum(-(-len(p) // 4) for p in prompts if len(p) > 4)
            assert decode.metric("penstock:kv_transfer_pages_total") == moved
            assert decode.metric("penstock:kv_transfer_bytes_total") == moved * decode.info.page_bytes
            assert decode.metric("penstock:handoff_failures_total") == 0
            told = [worker.metric("penstock:handoffs_total") for worker in (prefill, decode)]
            assert told == [0, sum(len(p) > 4 for p in prompts)]  # counted at one end, as failures are
            one_token = msgspec.structs.replace(GREEDY, max_tokens=1)
            prompt = [*range(7, 57)]
            for choice in range(CHOICES):
                request = GenerateRequest(request_id="n", choice=choice, prompt_token_ids=prompt, sampling=one_token)
                router.submit(decode.info, Submit(request=request, prefill=prefill.info))
            router.collect()
            told = [router.answers["n", choice].tokens for choice in range(CHOICES)]
            assert told == CHOICES * reference_tokens(path, [prompt], 1)
            decode.assert_idle()
            prefill.assert_idle()
            _the_prefill_worker_drains(router, prefill, decode, prompts, expected)
            decode.assert_idle()


def _the_prefill_worker_drains(
    router: RouterDouble,
    prefill: WorkerProcess,
    decode: WorkerProcess,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    """What it has been asked for it computes and hands off before it leaves."""
    assert prefill.info is not None and decode.info is not None
    deadline = time.monotonic() + 60
    with Tap({"prefill-0": prefill.info.address}, {}) as tap:
        while not tap.receive(0.05):  # heartbeats: it taps now
            assert time.monotonic() < deadline
        for i, prompt in enumerate(prompts):
            request = GenerateRequest(
                request_id=f"drained-{i}", prompt_token_ids=prompt, sampling=GREEDY, cache_salt="again"
            )
            router.submit(decode.info, Submit(request=request, prefill=prefill.info))
        unasked = sum(len(prompt) > 4 for prompt in prompts)
        while unasked:
            assert time.monotonic() < deadline
            router.turn()
            unasked -= sum(seen.tag == "prefill" for seen in tap.receive(0.0))
    prefill.process.terminate()
    router.collect()
    assert [router.answers[f"drained-{i}", 0].tokens for i in range(len(prompts))] == expected
    assert decode.metric("penstock:handoff_failures_total") == 0
    assert prefill.process.wait(60) == 0
