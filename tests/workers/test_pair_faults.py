"""What goes wrong between a prefill and a decode worker: every answer stays exact, and nothing is left behind."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import msgspec
import pytest

from penstock.common.messages import Abort, GenerateRequest, Submit
from penstock.common.sampling import SamplingParams
from tests.conftest import RedisServer
from tests.tiny_models import random_prompts, reference_tokens
from tests.workers.worker_processes import RouterDouble, workers

NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, seed=1)
PAIR = {"prefill-0": "prefill", "decode-0": "decode"}
FLAGS = {"block_size": 4, "max_num_batched_tokens": 16, "kv_cache_memory_bytes": "8MiB"}

pytestmark = pytest.mark.system


def _requests(prompts: list[list[int]], prefix: str = "", sampling: SamplingParams = GREEDY) -> list[GenerateRequest]:
    return [
        GenerateRequest(request_id=f"{prefix}{i}", prompt_token_ids=prompt, sampling=sampling)
        for i, prompt in enumerate(prompts)
    ]


def test_faults_of_one_pair(checkpoints: dict[str, Path], redis_server: RedisServer) -> None:
    """One pair of processes (starting them is what costs time), one fault after the other."""
    path = checkpoints["llama"]
    prompts = random_prompts([64, 90, 40, 33, 90, 64])
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    with workers(redis_server.url, path, PAIR, **FLAGS) as fleet:
        prefill, decode = fleet["prefill-0"], fleet["decode-0"]
        assert prefill.info is not None and decode.info is not None
        with RouterDouble(
            decode.info
        ) as router:  # not linked to the prefill worker: the decode worker relays first tokens
            router.wait_connected()
            _aborts_in_every_state(router, fleet, random_prompts([64, 90, 40, 33, 90, 64], seed=9))
            _a_stopped_prefill_worker_then_killed(router, fleet, prompts, expected)
            decode.assert_idle()


def _aborts_in_every_state(router: RouterDouble, fleet: dict, prompts: list[list[int]]) -> None:  # type: ignore[type-arg]
    prefill, decode = fleet["prefill-0"], fleet["decode-0"]
    for pause_s in (0.0, 0.005, 0.02, 0.05, 0.1):
        for request in _requests(prompts, f"abort-{pause_s}-"):
            router.submit(decode.info, Submit(request=request, prefill=prefill.info))
        deadline = time.monotonic() + pause_s
        while time.monotonic() < deadline:
            router.turn()
        for request in _requests(prompts, f"abort-{pause_s}-"):
            router.send(decode.info, Abort(request_id=request.request_id, attempt=0))
        decode.assert_idle()
        prefill.assert_idle()
    router.answers.clear()


def _a_stopped_prefill_worker_then_killed(
    router: RouterDouble,
    fleet: dict,  # type: ignore[type-arg]
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    prefill, decode = fleet["prefill-0"], fleet["decode-0"]
    long = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, seed=1, prompt_logprobs=0)
    prefill.kill(signal.SIGSTOP)
    for request in _requests(prompts, "kill-", long):
        router.submit(decode.info, Submit(request=request, prefill=prefill.info))
    router.turn()
    decode.wait_for(reads=len(prompts))
    prefill.kill(signal.SIGKILL)
    router.collect()
    assert [router.answers[f"kill-{i}", 0].tokens for i in range(len(prompts))] == expected
    assert decode.metric("penstock:handoff_failures_total") == len(prompts)
    _prompts_are_scored(router, prompts, "kill-")


def _prompts_are_scored(router: RouterDouble, prompts: list[list[int]], prefix: str = "") -> None:
    """By whoever computed a prompt in the end: all of its tokens, whatever pages had landed."""
    for i, prompt in enumerate(prompts):
        scored = [delta for delta in router.answers[f"{prefix}{i}", 0].deltas if delta.prompt_logprobs is not None]
        assert scored and all(delta.index == 0 and len(delta.prompt_logprobs) == len(prompt) - 1 for delta in scored)


@pytest.mark.parametrize("checksum", ["all", "off"])
def test_a_corrupted_byte_shows(checkpoints: dict[str, Path], redis_server: RedisServer, checksum: str) -> None:
    """The pages really move: a flipped byte changes the answer, unless checksums catch it, and then nothing changes."""
    path = checkpoints["llama"]
    prompts = random_prompts([64, 40, 90])
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    broken = {"module": "tests.workers.corrupting", "kv_checksum": checksum, "kv_transport": "shm"}
    with workers(redis_server.url, path, PAIR, **broken, **FLAGS) as fleet:
        prefill, decode = fleet["prefill-0"], fleet["decode-0"]
        assert prefill.info is not None and decode.info is not None
        with RouterDouble(decode.info, prefill.info) as router:
            router.wait_connected()
            for request in _requests(prompts, sampling=msgspec.structs.replace(GREEDY, prompt_logprobs=0)):
                router.submit(decode.info, Submit(request=request, prefill=prefill.info))
            router.collect()
            _prompts_are_scored(router, prompts)
            tokens = [router.answers[str(i), 0].tokens for i in range(len(prompts))]
            if checksum == "all":
                assert tokens == expected
                assert decode.metric("penstock:kv_checksum_failures_total") >= len(prompts)
                assert decode.metric("penstock:handoff_failures_total") == len(prompts)
                _corrupted_prefixes_are_dropped(router, fleet, path)
            else:
                assert all(got != want for got, want in zip(tokens, expected, strict=True))
                assert decode.metric("penstock:kv_checksum_failures_total") == 0
            decode.assert_idle()
            prefill.assert_idle()


def _corrupted_prefixes_are_dropped(
    router: RouterDouble,
    fleet: dict,  # type: ignore[type-arg]
    path: Path,
) -> None:
    """The prefill worker fetches prefixes that the decode worker holds, and the decode worker reads what it makes."""
    prefill, decode = fleet["prefill-0"], fleet["decode-0"]
    prompts = random_prompts([64, 40, 90], seed=31)
    router.answers.clear()
    for request in _requests(prompts, "alone-"):
        router.submit(decode.info, Submit(request=request))
    router.collect()
    longer = [[*prompt, 5, 6, 7, 8, 9] for prompt in prompts]
    for request in _requests(longer, "fetched-"):
        router.submit(decode.info, Submit(request=request, prefill=prefill.info, source=decode.info))
    router.collect()
    expected = reference_tokens(path, longer, NEW_TOKENS)
    assert [router.answers[f"fetched-{i}", 0].tokens for i in range(len(longer))] == expected
    assert prefill.metric("penstock:kv_checksum_failures_total") == sum(len(prompt) // 4 for prompt in prompts)
    assert prefill.metric("penstock:fetch_failures_total") == len(prompts)
    assert prefill.metric("penstock:fetched_tokens_total") == 0
