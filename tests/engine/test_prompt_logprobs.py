"""Logprobs of prompts against Hugging Face's, through both executors, in chunks, beside others, after preemption."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from penstock.common.messages import TokenLogprobs
from penstock.common.sampling import SamplingParams
from penstock.engine.build import BuiltEngine
from penstock.engine.device_runner import DeviceRunner
from penstock.kernels import launch
from tests.engine.engines import make_engine, request
from tests.tiny_models import random_prompts

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, not interpreted")
SCORED = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=4)


@pytest.fixture(scope="module")
def calm(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints whose scores spread over some 10, as a real model's do: over 100, float32 itself is off by 1e-4."""
    found = {}
    for family in ("llama", "mistral"):
        path = tmp_path_factory.mktemp(family) / "calm"
        shutil.copytree(checkpoints[family], path)
        weights = load_file(path / "model.safetensors")
        weights["lm_head.weight"] *= 0.1
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        found[family] = path
    return found


@pytest.fixture
def interpreted() -> Iterator[None]:
    launch.interpret_ops = True
    yield
    launch.interpret_ops = False


def run_all(
    built: BuiltEngine, prompts: list[list[int]], sampling: list[SamplingParams]
) -> dict[str, list[TokenLogprobs] | None]:
    """Prompt logprobs by number, as they come with the first token."""
    found: dict[str, list[TokenLogprobs] | None] = {}
    for number, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        built.engine.add(request(str(number), prompt, params))
    while built.engine.has_work():
        for output in built.engine.step().outputs:
            assert (output.prompt_logprobs is None) or output.index == 0
            if output.index == 0:
                scores = output.prompt_logprobs
                found[output.request.request_id] = None if scores is None else list(scores)
        built.engine.pages.check()
    assert built.engine.pages.num_held == 0
    return found


def check(path: Path, prompt: list[int], found: list[TokenLogprobs] | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    assert found is not None and len(found) == len(prompt) - 1
    for at, token, row in zip(found, prompt[1:], logprobs, strict=True):
        assert at.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert at.rank == int((row > row[token]).sum()) + 1
        assert at.top_logprobs == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("mode", [{}, {"max_num_batched_tokens": 7, "run_ahead": 1}], ids=str)
def test_equals_hugging_face(calm: dict[str, Path], family: str, mode: dict[str, int]) -> None:
    prompts = random_prompts([1, 2, 9, 33, 70])
    plain = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    built = make_engine(calm[family], **mode)  # type: ignore[arg-type]
    for _ in range(2):  # the second time the prompts are in the prefix cache, and are computed all the same
        found = run_all(built, [*prompts, prompts[2]], [*[SCORED] * 5, plain])
        for number, prompt in enumerate(prompts):
            check(calm[family], prompt, found[str(number)])
        assert found["5"] is None
    assert built.engine.scheduler.counters.prompt_tokens >= 2 * sum(map(len, prompts))
    built.engine.close()


def test_what_was_preempted_is_scored_once(calm: dict[str, Path]) -> None:
    prompts = random_prompts(random.Random(3).choices((9, 14, 20), k=8))
    longer = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, prompt_logprobs=4)
    built = make_engine(calm["llama"], pages=17, max_num_batched_tokens=9, max_model_len=60)
    found = run_all(built, prompts, [longer] * 8)
    assert built.engine.scheduler.counters.preemptions > 0
    for number, prompt in enumerate(prompts):
        check(calm["llama"], prompt, found[str(number)])
    built.engine.close()


@interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy says so where 32-bit products wrap, as they shall
def test_the_gpus_executor_in_the_interpreter(calm: dict[str, Path], interpreted: None) -> None:
    path = calm["llama"]
    built = make_engine(path, max_num_batched_tokens=12, max_num_seqs=2)
    runner = partial(DeviceRunner, max_num_seqs=2, max_num_batched_tokens=12, max_model_len=built.max_model_len)
    built.engine.executor = runner(built.engine.executor.model, built.pool)  # type: ignore[attr-defined]
    prompts = random_prompts([15, 3])
    found = run_all(built, prompts, [SCORED] * 2)
    for number, prompt in enumerate(prompts):
        check(path, prompt, found[str(number)])
    built.engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(calm: dict[str, Path]) -> None:
    prompts = random_prompts([1, 2, 9, 33, 70])
    built = make_engine(calm["llama"], device="cuda", max_num_batched_tokens=24)
    found = run_all(built, prompts, [SCORED] * 5)
    for number, prompt in enumerate(prompts):
        check(calm["llama"], prompt, found[str(number)])
    built.engine.close()
