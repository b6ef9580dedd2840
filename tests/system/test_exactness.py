"""The whole path against Hugging Face: HTTP, router, workers, hand-off. Greedy equal to it, seeded equal everywhere."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest

from tests.system.fleets import complete_all, fleet, metric
from tests.tiny_models import FAMILIES, random_prompts, reference_tokens

NEW_TOKENS = 12
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "extra_body": {"top_k": 40, "repetition_penalty": 1.1}}

# Every family in every way of moving pages; chunk and page sizes and a pool that preempts go round.
# Round-robin hands every long prompt off; what hand-offs cost, as measured on a busy machine, may speak against them.
PAIR = {"prefill_workers": 1, "decode_workers": 1, "routing_policy": "round-robin"}
MODES = {
    "aggregated": {},
    "nixl": {**PAIR, "kv_transport": "nixl"},
    "shm": {**PAIR, "kv_transport": "shm"},
}
SIZES = [
    {"max_num_batched_tokens": 64, "block_size": 4},
    {"max_num_batched_tokens": 7, "block_size": 16},
    {"max_num_batched_tokens": 1, "block_size": 4},
    {"max_num_batched_tokens": 64, "block_size": 4, "pages": 40},
]
CASES = [
    pytest.param(family, mode, SIZES[(i + j) % len(SIZES)], id=f"{family}-{mode}")
    for i, family in enumerate(FAMILIES)
    for j, mode in enumerate(MODES)
]

pytestmark = pytest.mark.system


@cache
def _prompts() -> list[list[int]]:
    chooser = random.Random(4)
    return random_prompts([chooser.choice((1, 3, 9, 17, 33, 48, 64, 90)) for _ in range(40)], seed=4)


_seeded_answers: dict[str, list[list[int]]] = {}  # by family: the first mode's, all others must equal it


@pytest.mark.parametrize(("family", "mode", "sizes"), CASES)
def test_every_mode_equals_hugging_face(
    checkpoints: dict[str, Path], family: str, mode: str, sizes: dict[str, int]
) -> None:
    prompts = _prompts()
    expected = reference_tokens(checkpoints[family], prompts, NEW_TOKENS)
    options = {**MODES[mode], **{k: v for k, v in sizes.items() if k != "pages"}}
    if "pages" in sizes:
        options["kv_cache_memory_bytes"] = sizes["pages"] * _page_bytes(checkpoints[family], sizes["block_size"])
    with fleet(checkpoints[family], **options) as running:
        assert complete_all(running, prompts, NEW_TOKENS) == expected
        if mode != "aggregated":
            assert metric(running, "penstock:kv_transfer_bytes_total") > 0
        if "pages" in sizes:
            while not metric(running, "vllm:num_preemptions_total"):  # unless too few were there at once
                assert complete_all(running, prompts, NEW_TOKENS, spread_s=0.0) == expected
        else:
            hits = metric(running, "vllm:prefix_cache_hits_total")
            assert complete_all(running, prompts[:8], NEW_TOKENS) == expected[:8]
            assert metric(running, "vllm:prefix_cache_hits_total") > hits
        seeded = complete_all(running, prompts[:12], NEW_TOKENS, **SEEDED)
        assert seeded == _seeded_answers.setdefault(family, seeded)
        assert metric(running, "penstock:handoff_failures_total") == 0


def _page_bytes(path: Path, page_size: int) -> int:
    from penstock.models.spec import read_spec

    spec = read_spec(path)
    return spec.num_kv_heads * spec.num_layers * 2 * page_size * spec.head_dim * 4
