"""The engine against Hugging Face: greedy tokens equal in every way of batching, chunking, paging and preempting."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from msgspec import structs

from penstock.common.sampling import SamplingParams
from tests.engine.engines import make_engine, request, run
from tests.tiny_models import FAMILIES, random_prompts, reference_tokens

NEW_TOKENS = 12


def _lengths(count: int, seed: int = 1) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.choice((1, 2, 3, 5, 8, 17, 31, 40, 64, 90)) for _ in range(count)]


def _greedy(count: int = NEW_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("chunk", "page_size"), [(64, 4), (7, 16), (1, 4)])
def test_greedy_equals_hugging_face(checkpoints: dict[str, Path], family: str, chunk: int, page_size: int) -> None:
    path = checkpoints[family]
    prompts = random_prompts(_lengths(24))
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    built = make_engine(path, max_num_batched_tokens=chunk, block_size=page_size)
    chooser = random.Random(2)
    arrivals = [(chooser.randrange(60), request(str(i), p, _greedy())) for i, p in enumerate(prompts)]
    tokens, finishes = run(built, arrivals)
    assert [tokens[str(i)] for i in range(len(prompts))] == expected
    assert {f.reason for f in finishes.values()} == {"length"}
    built.engine.close()


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_steps_in_flight_change_nothing(checkpoints: dict[str, Path], run_ahead: int) -> None:
    path = checkpoints["qwen3"]
    prompts = random_prompts(_lengths(24))
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    stops = [tokens[3 + i % 8] if i % 2 else None for i, tokens in enumerate(expected)]  # every other one stops early
    for i, stop in enumerate(stops):
        if stop is not None:
            expected[i] = expected[i][: expected[i].index(stop) + 1]
    built = make_engine(path, pages=60, run_ahead=run_ahead, max_num_batched_tokens=16, max_num_seqs=6)
    arrivals = []
    for i, (prompt, stop) in enumerate(zip(prompts, stops, strict=True)):
        sampling = structs.replace(_greedy(), stop_token_ids=[] if stop is None else [stop])
        arrivals.append((i, request(str(i), prompt, sampling)))
    tokens, finishes = run(built, arrivals)
    assert [tokens[str(i)] for i in range(len(prompts))] == expected
    assert [finishes[str(i)].stop_reason for i in range(len(prompts))] == stops
    built.engine.close()


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_preemption_changes_nothing(checkpoints: dict[str, Path], family: str, run_ahead: int) -> None:
    path = checkpoints[family]
    prompts = random_prompts([40, 31, 40, 17, 40, 31, 8, 40])
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    built = make_engine(path, pages=30, run_ahead=run_ahead, enable_prefix_caching=False)
    tokens, _ = run(built, [(0, request(str(i), p, _greedy())) for i, p in enumerate(prompts)])
    assert built.engine.scheduler.counters.preemptions > 0
    assert [tokens[str(i)] for i in range(len(prompts))] == expected
    built.engine.close()


def test_repeated_prompts_hit_the_prefix_cache(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["llama"]
    prompts = random_prompts([40, 64, 33])
    expected = reference_tokens(path, prompts, NEW_TOKENS)
    built = make_engine(path)
    for _ in range(2):
        tokens, _ = run(built, [(0, request(str(i), p, _greedy())) for i, p in enumerate(prompts)])
        assert [tokens[str(i)] for i in range(len(prompts))] == expected
    # Of the second round all full pages but the last token's are found: 36 + 60 + 32 tokens.
    assert built.engine.scheduler.counters.prefix_hits == 128
    salted = request("salted", prompts[0], _greedy(), cache_salt="other tenant")
    run(built, [(0, salted)])
    assert built.engine.scheduler.counters.prefix_hits == 128
    built.engine.close()


SEEDED = SamplingParams(
    temperature=0.9,
    top_k=40,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    seed=7,
    max_tokens=NEW_TOKENS,
    ignore_eos=True,
)


def test_seeded_sampling_is_the_same_in_every_mode(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["qwen3"]
    prompts = random_prompts([5, 40, 17, 64, 33, 1, 28, 40])
    modes = [
        {},
        {"max_num_batched_tokens": 7},
        {"block_size": 16},
        {"pages": 30, "enable_prefix_caching": False},
        {"pages": 30, "run_ahead": 1},
    ]
    results = []
    for options in modes:
        built = make_engine(path, **options)  # type: ignore[arg-type]
        arrivals = [(i, request(str(i), p, SEEDED, choice=i % 3)) for i, p in enumerate(prompts)]
        results.append(run(built, arrivals)[0])
        built.engine.close()
    assert all(result == results[0] for result in results)
    again = make_engine(path)
    other_choice, _ = run(again, [(0, request("0", prompts[0], SEEDED, choice=1))])
    assert other_choice["0"] != results[0]["0"]
    again.engine.close()


def test_a_request_resumes_from_tokens_it_already_has(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["mistral"]
    prompt = random_prompts([30])[0]
    built = make_engine(path)
    whole, _ = run(built, [(0, request("a", prompt, SEEDED))])
    for kept in (1, 5, NEW_TOKENS - 1):
        resumed = request("a", prompt, SEEDED, attempt=kept, output_token_ids=whole["a"][:kept])
        built.engine.add(resumed)
        rest: list[int] = []
        while built.engine.has_work():
            for output in built.engine.step().outputs:
                assert output.index == kept + len(rest)
                rest += output.token_ids
        assert whole["a"][:kept] + rest == whole["a"]
    built.engine.close()
