"""Prefixes that workers read from each other, between real processes: tokens equal Hugging Face's, whatever happens."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from penstock.common.messages import GenerateRequest, Spans, Submit, WorkerInfo
from penstock.common.sampling import SamplingParams
from tests.conftest import RedisServer
from tests.tiny_models import random_prompts, reference_tokens
from tests.workers.worker_processes import RouterDouble, WorkerProcess, workers

NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, seed=1)
PAGE = 4
PATIENT = "tests.workers.patient"
FLAGS = {"block_size": PAGE, "max_num_batched_tokens": 16, "kv_cache_memory_bytes": "8MiB"}

pytestmark = pytest.mark.system


def _serve(
    router: RouterDouble,
    at: WorkerProcess,
    prompts: list[list[int]],
    name: str,
    *,
    prefill: WorkerInfo | None = None,
    source: WorkerInfo | None = None,
) -> list[list[int]]:
    """All prompts at one decode worker; their tokens."""
    assert at.info is not None
    for i, prompt in enumerate(prompts):
        request = GenerateRequest(request_id=f"{name}-{i}", prompt_token_ids=prompt, sampling=GREEDY)
        router.submit(at.info, Submit(request=request, prefill=prefill, source=source))
    router.collect()
    return [router.answers[f"{name}-{i}", 0].tokens for i in range(len(prompts))]


def _spans(router: RouterDouble, name: str, number: int, worker: str) -> Spans:
    """What a worker told last of its part."""
    deltas = router.answers[f"{name}-{number}", 0].deltas
    found = [delta.spans for delta in deltas if delta.spans is not None and delta.spans.worker == worker]
    assert found, (name, number, worker)
    return found[-1]


def _full_pages(prompts: list[list[int]]) -> int:
    return sum((len(prompt) - 1) // PAGE for prompt in prompts)


@pytest.mark.parametrize("transport", ["shm", "nixl"])
def test_prefixes_between_workers_of_every_role(
    checkpoints: dict[str, Path], redis_server: RedisServer, transport: str
) -> None:
    """From decode to decode, from prefill to decode, and from decode to prefill: the next turn of a conversation."""
    path = checkpoints["llama"]
    prompts = random_prompts([64, 90, 40, 33], seed=21)
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    turns = [[*prompt, *tokens, *more] for prompt, tokens, more in zip(prompts, expected, prompts[::-1], strict=True)]
    expected_turns = reference_tokens(path, turns, NEW_TOKENS)
    roles = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
    with workers(redis_server.url, path, roles, module=PATIENT, kv_transport=transport, **FLAGS) as fleet:
        prefill, first, second = (fleet[name] for name in roles)
        assert prefill.info and first.info and second.info
        with RouterDouble(first.info, second.info, prefill.info) as router:
            router.wait_connected()
            assert _serve(router, first, prompts, "alone") == expected
            assert _serve(router, second, prompts, "fetched", source=first.info) == expected
            spans = [_spans(router, "fetched", i, "decode-1") for i in range(len(prompts))]
            assert [s.fetched_tokens for s in spans] == [(len(p) - 1) // PAGE * PAGE for p in prompts]
            assert all(s.computed_tokens == len(p) - s.fetched_tokens for s, p in zip(spans, prompts, strict=True))
            assert {(s.source, s.transport, s.cached_tokens) for s in spans} == {("decode-0", transport, 0)}
            assert second.metric("penstock:fetched_tokens_total") == _full_pages(prompts) * PAGE
            assert second.metric("penstock:fetches_total") == len(prompts)

            handed = _serve(router, first, turns, "turn", prefill=prefill.info, source=first.info)
            assert handed == expected_turns
            spans = [_spans(router, "turn", i, "prefill-0") for i in range(len(prompts))]
            known = [(len(p) + NEW_TOKENS - 1) // PAGE * PAGE for p in prompts]  # of the last token nothing is computed
            assert [s.fetched_tokens for s in spans] == known, spans
            assert prefill.metric("penstock:fetched_tokens_total") == sum(known)
            assert prefill.metric("vllm:prompt_tokens_total") == sum(map(len, turns)) - sum(known)

            assert _serve(router, second, turns, "from-prefill", source=prefill.info) == expected_turns
            assert _spans(router, "from-prefill", 0, "decode-1").source == "prefill-0"
            for worker in fleet.values():
                assert worker.metric("penstock:fetch_failures_total") == 0
                worker.assert_idle()


def test_faults_of_sources(checkpoints: dict[str, Path], redis_server: RedisServer) -> None:
    """Evicted, stopped, killed: the reader computes, nothing is wrong and nothing stays."""
    path = checkpoints["qwen2"]
    prompts = random_prompts([64, 90, 40, 33], seed=22)
    others = random_prompts([250] * 3, seed=23)
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    small = {**FLAGS, "kv_cache_memory_bytes": "512KiB", "max_model_len": 512}
    roles = {"decode-0": "decode", "decode-1": "decode"}
    with workers(redis_server.url, path, roles, **small) as fleet:
        source, reader = fleet["decode-0"], fleet["decode-1"]
        assert source.info and reader.info
        with RouterDouble(source.info, reader.info) as router:
            router.wait_connected()
            _serve(router, source, prompts, "alone")
            _serve(router, source, others, "evicting")
            _serve(router, source, others[::-1], "evicting-more")
            assert _serve(router, reader, prompts, "evicted", source=source.info) == expected
            assert reader.metric("penstock:fetched_tokens_total") < _full_pages(prompts) * PAGE
            assert reader.metric("penstock:fetch_failures_total") == 0

            again = [[*prompt[1:], 7] for prompt in prompts]
            expected_again = reference_tokens(path, again, NEW_TOKENS)
            _serve(router, source, again, "again")
            source.kill(signal.SIGSTOP)
            assert _serve(router, reader, again, "stopped", source=source.info) == expected_again
            failures = reader.metric("penstock:fetch_failures_total")
            assert failures == len(again)
            reader.assert_idle()
            source.kill(signal.SIGCONT)
            source.assert_idle()
            third = [[*prompt[2:], 7, 8] for prompt in prompts]
            _serve(router, source, third, "third")
            source.kill()
            expected_third = reference_tokens(path, third, NEW_TOKENS)
            assert _serve(router, reader, third, "killed", source=source.info) == expected_third
            assert reader.metric("penstock:fetch_failures_total") == failures + len(third)
            reader.assert_idle()
