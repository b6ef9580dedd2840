"""Beam search against Hugging Face's: the same sequences and scores; shared pages; nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock import LLM, BeamSearchParams
from penstock.common.beam_search import BeamSearch
from penstock.common.messages import TokenLogprobs
from tests.tiny_models import random_prompts

END = 1  # <|end|>
PROMPTS = random_prompts([5, 23], seed=4)


@pytest.fixture(scope="module")
def llm(checkpoints: dict[str, Path]) -> Iterator[LLM]:
    found = LLM(
        str(checkpoints["llama"]), device="cpu", block_size=4, max_num_seqs=16, max_model_len=128,
        kv_cache_memory_bytes=4 << 20, cpu_threads=1,
    )  # fmt: skip
    yield found
    found.close()


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32).eval()


def expected(
    model: Any, prompt: list[int], width: int, penalty: float, end: int | None
) -> list[tuple[list[int], float]]:
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = end
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width, length_penalty=penalty,
        max_new_tokens=10, do_sample=False, early_stopping=False, pad_token_id=0, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    texts = []
    for sequence, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        output = sequence[len(prompt) :]
        if end in output:
            output = output[: output.index(end) + 1]
        texts.append((output, score))
    return texts


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_equals_hugging_face(
    llm: LLM, reference: Any, monkeypatch: pytest.MonkeyPatch, width: int, penalty: float
) -> None:
    prompt, ends = PROMPTS[width % 2], (width % 2 == 0) != (penalty == 1.0)
    likely = reference(torch.tensor([prompt])).logits[0, -1].topk(3).indices[2].item()
    end = int(likely) if ends else None  # some beams end early
    monkeypatch.setattr(llm.intake, "_limits", replace(llm.intake._limits, eos_token_ids=(end,) if ends else ()))
    theirs = expected(reference, prompt, width, penalty, end)
    params = BeamSearchParams(beam_width=width, max_tokens=10, length_penalty=penalty)
    [output] = llm.beam_search(prompt, params)
    assert [found.tokens[len(prompt) :] for found in output.sequences] == [tokens for tokens, _ in theirs]
    assert [found.score for found in output.sequences] == pytest.approx([s for _, s in theirs], abs=1e-3, rel=1e-4)
    for found in output.sequences:
        chosen = zip(found.tokens[len(prompt) :], found.logprobs, strict=True)
        assert found.cum_logprob == pytest.approx(sum(at[token].logprob for token, at in chosen))
        assert all(len(at) == max(2, 1 + ends) * width for at in found.logprobs)
        assert found.finish_reason == ("stop" if ends and found.tokens[-1] == end else "length")
    assert (llm.engine.pages.num_held, llm.engine.has_work()) == (0, False)
    llm.engine.pages.check()


def test_beams_share_the_pages_of_the_prompt(llm: LLM) -> None:
    [prompt] = random_prompts([80], seed=12)
    computed = llm.engine.scheduler.counters.prompt_tokens
    most = 0
    step = llm.engine.step

    def watching() -> Any:
        nonlocal most
        output = step()
        most = max(most, llm.engine.pages.num_held)
        return output

    llm.engine.step = watching  # type: ignore[method-assign]
    try:
        llm.beam_search({"prompt_token_ids": prompt}, BeamSearchParams(beam_width=4, max_tokens=8, ignore_eos=True))
    finally:
        llm.engine.step = step  # type: ignore[method-assign]
    assert most <= 20 + 4 * 3  # 20 pages of the prompt, and each beam's own
    assert llm.engine.scheduler.counters.prompt_tokens - computed < 80 + 8 * 4 * 8


def test_a_limit_changes_nothing_but_the_order_of_work(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True)
    free = llm.beam_search(PROMPTS, params)
    at_once = 0
    step = llm.engine.step

    def watching() -> Any:
        nonlocal at_once
        output = step()
        at_once = max(at_once, len(llm.engine.scheduler.running))
        return output

    monkeypatch.setattr(llm.engine, "step", watching)
    assert llm.beam_search(PROMPTS, params, concurrency_limit=1) == free
    assert at_once <= 2, "the beams of one prompt"
    with pytest.raises(ValueError, match="concurrency_limit"):
        llm.beam_search(PROMPTS, params, concurrency_limit=0)


def test_the_text_of_an_end(llm: LLM, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    likely = int(reference(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    monkeypatch.setattr(llm.intake, "_limits", replace(llm.intake._limits, eos_token_ids=(likely,)))
    for include in (False, True):
        params = BeamSearchParams(beam_width=2, max_tokens=3, length_penalty=0.0, include_stop_str_in_output=include)
        [output] = llm.beam_search(PROMPTS[0], params)
        [ended] = [found for found in output.sequences if found.tokens[len(PROMPTS[0]) :] == [likely]]
        tokenizer = llm.get_tokenizer()
        text = tokenizer.decode(PROMPTS[0])
        assert (ended.text == text + tokenizer.token_text(likely)) or not include
        assert ended.finish_reason == "stop"


def test_wrong_values(llm: LLM) -> None:
    for fields, name in (
        ({"beam_width": 0}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": 1e9}, "length"),
    ):
        with pytest.raises(ValueError, match=name):
            BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **fields})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a prompt must have"):
        llm.beam_search([[5] * 128], BeamSearchParams(beam_width=2, max_tokens=4))


def test_a_search_ends_when_nothing_better_can_come() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=1, max_tokens=9, length_penalty=0.0), {END}, 9)
    search.advance([TokenLogprobs(-0.1, 1, [END, 5], [-0.1, -3.0])])
    assert search.running == [] and search.finished[0].beam.token_ids == (END,) and search.finished[0].ended
