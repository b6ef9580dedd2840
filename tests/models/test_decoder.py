"""The decoder against Hugging Face: the same tokens, for every family, chunk size, page size and mixture of a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.kernels.paged_batch import PagedBatch
from tests.models.paged_loop import PagedLoop, load
from tests.tiny_models import FAMILIES, make_checkpoint, random_prompts, reference_tokens

LENGTHS = [1, 3, 16, 17, 40, 75, 130]
NUM_TOKENS = 40


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("chunk", "page_size"), [(1, 4), (7, 4), (7, 16), (64, 16), (64, 4), (10**6, 16)])
def test_tokens_equal_hugging_face(checkpoints: dict[str, Path], family: str, chunk: int, page_size: int) -> None:
    prompts = random_prompts(LENGTHS)
    loop = PagedLoop(load(checkpoints[family]), page_size)
    assert loop.generate(prompts, NUM_TOKENS, chunk) == reference_tokens(checkpoints[family], prompts, NUM_TOKENS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_hugging_face_on_a_gpu(checkpoints: dict[str, Path], family: str) -> None:
    prompts = random_prompts(LENGTHS)
    loop = PagedLoop(load(checkpoints[family], device="cuda"), 16, device="cuda")
    assert loop.generate(prompts, NUM_TOKENS, 64) == reference_tokens(checkpoints[family], prompts, NUM_TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_whole_prompts_equal_hugging_face(checkpoints: dict[str, Path], family: str) -> None:
    prompts = random_prompts([5, 100, 33])
    logits = PagedLoop(load(checkpoints[family]), 16).step(prompts, [0, 0, 0], [[], [], []])
    assert logits.dtype == torch.float32
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32)
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_asked_of_last_tokens_only_is_the_same(checkpoints: dict[str, Path], family: str) -> None:
    model = load(checkpoints[family])
    prompts = random_prompts([5, 30, 1])
    lengths = [len(prompt) for prompt in prompts]
    results, pools = [], []
    for only in (False, True):
        loop = PagedLoop(model, 16)
        for keys, values in loop.kv:
            keys.zero_(), values.zero_()
        batch = PagedBatch.build(lengths, lengths, [[0], [1, 2], [3]], 16, "cpu")
        token_ids = torch.tensor([token for prompt in prompts for token in prompt])
        with torch.inference_mode():
            hidden = model.forward(token_ids, batch, loop.kv, batch.last_rows if only else None)
        results.append(hidden if only else hidden[batch.last_rows])
        pools.append(torch.stack([torch.stack(layer) for layer in loop.kv]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(pools[1], pools[0]), "later tokens need the keys and values of all"


def test_prompts_may_share_pages(checkpoints: dict[str, Path]) -> None:
    prefix, *tails = random_prompts([32, 5, 9])
    prompts = [prefix + tail for tail in tails]
    loop = PagedLoop(load(checkpoints["llama"]), 16)
    table: list[int] = []
    loop.step([prefix], [0], [table])
    logits = loop.step(tails, [32, 32], [list(table), list(table)])
    expected = reference_tokens(checkpoints["llama"], prompts, 1)
    assert logits.argmax(-1).tolist() == [tokens[0] for tokens in expected]


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_equals_hugging_face(tmp_path: Path, kind: str) -> None:
    # Dynamic NTK begins to stretch at 64 tokens: these prompts are decoded across that line.
    path = make_checkpoint("llama", tmp_path, rope_parameters=ROPES[kind], max_position_embeddings=64)
    prompts = random_prompts([60, 7])
    assert PagedLoop(load(path), 16).generate(prompts, 60, 7) == reference_tokens(path, prompts, 60)


WINDOWS = [
    {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    {"use_sliding_window": False, "sliding_window": 20, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2},
]


@pytest.mark.parametrize("window", WINDOWS)
def test_windows_of_some_layers_equal_hugging_face(tmp_path: Path, window: dict[str, object]) -> None:
    path = make_checkpoint("qwen3", tmp_path, num_hidden_layers=4, **window)
    prompts = random_prompts([50, 7])
    assert PagedLoop(load(path), 4).generate(prompts, 40, 16) == reference_tokens(path, prompts, 40)


def test_biases_of_llama_equal_hugging_face(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path, attention_bias=True, mlp_bias=True)
    prompts = random_prompts([30, 7])
    assert PagedLoop(load(path), 16).generate(prompts, 20, 16) == reference_tokens(path, prompts, 20)


def test_bfloat16_follows_float32(checkpoints: dict[str, Path]) -> None:
    prompts = random_prompts([40])
    exact = PagedLoop(load(checkpoints["qwen3"]), 16).step(prompts, [0], [[]])
    loop = PagedLoop(load(checkpoints["qwen3"], torch.bfloat16), 16)
    loop.kv = [(k.bfloat16(), v.bfloat16()) for k, v in loop.kv]
    rounded = loop.step(prompts, [0], [[]])
    assert torch.corrcoef(torch.cat((exact, rounded)))[0, 1] > 0.99


def test_one_of_each_layer_has_every_window_as_a_layer_and_as_the_last_one(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path, num_hidden_layers=4)
    model = load(path)
    plain = model.one_of_each_layer()
    assert (plain.spec.num_layers, plain.spec.sliding_windows) == (2, (None, None))
    assert plain._layers == [model._layers[0], model._layers[3]]
    model.spec = replace(model.spec, sliding_windows=(None, 8, None, 16))
    few = model.one_of_each_layer()
    assert few.spec.sliding_windows == (None, 8, 16)
    assert few._layers == [model._layers[index] for index in (0, 1, 3)]
    assert (model.spec.num_layers, len(model._layers)) == (4, 4)
