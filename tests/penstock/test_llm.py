"""The offline `LLM` gives what Hugging Face gives, whatever is asked of sampling, choices, stops and scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock import LLM, SamplingParams
from tests.penstock.offline import GREEDY, OPTIONS, TEXT, run, tokens
from tests.tiny_models import random_prompts, reference_tokens


def test_greedy_equals_hugging_face(llm: LLM, checkpoints: dict[str, Path]) -> None:
    prompts = random_prompts([1, 3, 17, 40, 75], seed=8)
    answers = run(llm, prompts)
    assert tokens(answers) == reference_tokens(checkpoints["qwen2"], prompts, 12)
    for prompt, answer in zip(prompts, answers, strict=True):
        [output] = answer.outputs
        assert answer.finished and answer.prompt is None and answer.prompt_token_ids == prompt
        assert (output.index, output.finish_reason, output.stop_reason) == (0, "length", None)
        assert (output.logprobs, output.cumulative_logprob) == (None, None)
    assert len({answer.request_id for answer in answers}) == len(prompts)


def test_a_prefix_is_reused_unless_its_salt_differs(llm: LLM) -> None:
    [prompt] = random_prompts([21], seed=77)
    salted = [{"prompt_token_ids": prompt, "cache_salt": salt} for salt in ("s", "t")]
    first, second, other = run(llm, salted[0])[0], run(llm, salted[0])[0], run(llm, salted[1])[0]
    assert [answer.num_cached_tokens for answer in (first, second, other)] == [0, 20, 0]


def test_the_longest_start_first_and_answers_keep_their_order(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts([3, 4, 5, 6])
    lengths = [2, 9, 2, 12]
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    added: list[int] = []
    add = llm.engine.add

    def noting(source: Any, **options: Any) -> str:
        added.append(source.sampling.max_tokens)
        return add(source, **options)

    monkeypatch.setattr(llm.engine, "add", noting)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert added == [12, 9, 2, 2]
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths


def test_tokens_favoured_and_ruled_out(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    [plain] = tokens(run(llm, TEXT))
    favoured = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logit_bias={33: 100.0})
    allowed = SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True, allowed_token_ids=[40, 50, 60])
    word = next(text for token in plain if (text := tokenizer.decode([token]).strip()).isalpha())
    banned = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, bad_words=[word])
    found = tokens(run(llm, [TEXT] * 3, [favoured, allowed, banned]))
    assert found[0] == [33] * 6
    assert set(found[1]) == {40, 50, 60}
    assert word not in tokenizer.decode(found[2]) and found[2] != plain
    for fields, name in (
        ({"logit_bias": {400: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [2, 999]}, "allowed_token_ids"),
        ({"bad_words_token_ids": [[400]]}, "bad_words"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must hold token ids from 0 to 399"):
            run(llm, TEXT, SamplingParams(**fields))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^bad_words and bad_words_token_ids must be at most 256 sequences"):
        run(llm, TEXT, SamplingParams(bad_words=[word], bad_words_token_ids=[[40]] * 256))


def test_prompt_logprobs(llm: LLM, checkpoints: dict[str, Path]) -> None:
    [prompt] = random_prompts([11], seed=5)
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=2)
    scored, plain = run(llm, [prompt, prompt], [params, GREEDY])
    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2"], dtype=torch.float64)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert plain.prompt_logprobs is None and scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None and len(scored.prompt_logprobs) == 11
    for token, found, row in zip(prompt[1:], scored.prompt_logprobs[1:], expected, strict=False):
        assert found is not None and set(found) == {token, *row.topk(2).indices.tolist()}
        assert found[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert found[token].rank == int((row > row[token]).sum()) + 1


def test_the_lowest_priority_first(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    add = llm.engine.add

    def noting(source: Any, **options: Any) -> str:
        added.append(source.priority)
        return add(source, **options)

    monkeypatch.setattr(llm.engine, "add", noting)
    llm.generate([TEXT] * 4, GREEDY, use_tqdm=False, priority=[3, 0, -1, 0])
    assert added == [-1, 0, 0, 3]
    with pytest.raises(ValueError, match="4 prompts, but 1 priorities"):
        llm.generate([TEXT] * 4, GREEDY, use_tqdm=False, priority=[3])


def test_choices_share_the_pages_of_their_prompt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four choices of a prompt of 20 full pages and a part: they hold those once, and it is computed once."""
    size = llm.engine.pages.page_size
    [prompt] = random_prompts([20 * size + 2], seed=91)
    params = SamplingParams(n=4, seed=3, temperature=1.5, max_tokens=size, ignore_eos=True)
    counters = llm.engine.scheduler.counters
    before, held = counters.prompt_tokens, []
    step = llm.engine.step

    def watching() -> Any:
        output = step()
        held.append(llm.engine.pages.num_held)
        return output

    monkeypatch.setattr(llm.engine, "step", watching)
    [answer] = run(llm, prompt, params)
    monkeypatch.undo()
    assert 20 + 4 <= max(held) <= 20 + 4 * 2  # each has the rest of its prompt and its output to itself
    assert counters.prompt_tokens - before <= len(prompt) + 3 * size
    for output in answer.outputs[1:]:  # as if each had computed the prompt itself
        [alone] = llm.generate([{"prompt_token_ids": prompt, "cache_salt": str(output.index)}], params, use_tqdm=False)
        assert alone.outputs[output.index].token_ids == output.token_ids


def test_choices_and_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=3, temperature=1.5, max_tokens=8, ignore_eos=True)
    [first], [second] = run(llm, TEXT, params), run(llm, TEXT, params)
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in first.outputs}) == 3
    assert [output.token_ids for output in first.outputs] == [output.token_ids for output in second.outputs]
    unseeded = SamplingParams(temperature=20.0, max_tokens=16, ignore_eos=True)
    assert len({tuple(ids) for ids in tokens(run(llm, [TEXT] * 4, unseeded))}) > 1


def test_a_seeded_llm_repeats_its_unseeded_requests(model: Path) -> None:
    unseeded = SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True)
    answers = []
    for _ in range(2):
        llm = LLM(str(model), seed=11, **OPTIONS)
        answers.append(tokens(run(llm, [TEXT, TEXT], unseeded)))
        llm.close()
    assert answers[0] == answers[1] and answers[0][0] != answers[0][1]


def test_logprobs_equal_hugging_face(llm: LLM, model: Path) -> None:
    [answer] = run(llm, TEXT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3))
    [output] = answer.outputs
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = answer.prompt_token_ids + output.token_ids
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)[len(answer.prompt_token_ids) - 1 : -1]
    assert output.logprobs is not None and len(output.logprobs) == 6
    for token, found, row in zip(output.token_ids, output.logprobs, expected, strict=True):
        values, best = row.topk(3)
        assert list(found) == best.tolist() and found[token].rank == 1
        assert [at.rank for at in found.values()] == [1, 2, 3]
        assert [at.logprob for at in found.values()] == pytest.approx(values.tolist(), abs=1e-4)
        assert found[token].decoded_token == llm.get_tokenizer().token_text(token)
    chosen = expected[range(6), output.token_ids].sum().item()
    assert output.cumulative_logprob == pytest.approx(chosen, abs=1e-3)
    [alone] = run(llm, TEXT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0))
    assert alone.outputs[0].logprobs is not None and [len(at) for at in alone.outputs[0].logprobs] == [1] * 6


def test_stop_strings_cut_text_and_tokens(llm: LLM) -> None:
    [whole] = run(llm, TEXT)
    full, ids, decode = whole.outputs[0].text, whole.outputs[0].token_ids, llm.get_tokenizer().decode
    ends = [len(decode(ids[: i + 1])) for i in range(len(ids))]
    stop = full[ends[3] - 1 : ends[4] + 1]  # spans three tokens
    position = full.index(stop)
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=12, ignore_eos=True, stop=[stop], include_stop_str_in_output=include
        )
        [answer] = run(llm, TEXT, params)
        [output] = answer.outputs
        assert output.text == full[: position + len(stop) * include]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        kept = next(i for i, end in enumerate(ends) if end >= position + len(stop)) + 1
        assert output.token_ids == ids[:kept] and kept < 12
        assert answer.num_cached_tokens > 0  # also known of a request that a stop string ended


def test_stop_token_ids_and_min_tokens(llm: LLM) -> None:
    [ids] = tokens(run(llm, TEXT))
    [output] = run(llm, TEXT, SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[ids[4]]))[0].outputs
    first = ids.index(ids[4])
    assert output.token_ids == ids[: first + 1] and (output.finish_reason, output.stop_reason) == ("stop", ids[4])
    assert output.text == llm.get_tokenizer().decode(ids[:first])
    later = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[ids[4]], min_tokens=10)
    assert len(tokens(run(llm, TEXT, later))[0]) >= 10


def test_text_ends_at_an_id_that_only_generation_config_names(model: Path, tmp_path: Path, llm: LLM) -> None:
    [ids] = tokens(run(llm, TEXT))
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, ids[5]]}))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = torch.tensor([llm.get_tokenizer().encode(TEXT)])
    expected = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    other = LLM(str(tmp_path), **OPTIONS)
    [output] = run(other, TEXT, SamplingParams(temperature=0, max_tokens=12))[0].outputs
    other.close()
    assert output.token_ids == expected[0, prompt.shape[1] :].tolist() and output.token_ids[-1] == ids[5]
    assert output.finish_reason == "stop"


def test_text_that_is_not_wanted_is_not_there(llm: LLM) -> None:
    [answer] = run(llm, TEXT, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False))
    assert answer.outputs[0].text == "" and len(answer.outputs[0].token_ids) == 4


def test_tokens_without_text_are_those_with_text(llm: LLM) -> None:
    """Also where a token ends the output: without text nothing but the engine decides what is kept."""
    with_text = SamplingParams(temperature=0, max_tokens=12, n=2, seed=1)
    [ids] = tokens(run(llm, TEXT, GREEDY))
    for more in ({"ignore_eos": True}, {"stop_token_ids": [ids[4]]}, {"stop_token_ids": [ids[4]], "min_tokens": 9}):
        shown = run(llm, TEXT, msgspec.structs.replace(with_text, **more))[0].outputs
        silent = run(llm, TEXT, msgspec.structs.replace(with_text, **more, detokenize=False))[0].outputs
        assert [o.text for o in silent] == ["", ""]
        assert [(o.token_ids, o.finish_reason, o.stop_reason) for o in silent] == [
            (o.token_ids, o.finish_reason, o.stop_reason) for o in shown
        ]


def test_a_long_request_ends_at_the_context(llm: LLM) -> None:
    [prompt] = random_prompts([250], seed=3)
    [output] = run(llm, prompt, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[0].outputs
    assert (len(output.token_ids), output.finish_reason) == (6, "length")
    [output] = run(llm, prompt, SamplingParams(temperature=0, max_tokens=20, min_tokens=20, ignore_eos=True))[0].outputs
    assert len(output.token_ids) == 6
