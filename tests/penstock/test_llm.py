"""The offline `LLM`: what it takes and gives, equal to Hugging Face, and an engine that is empty after every call."""

from __future__ import annotations

import gc
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from penstock import LLM, EngineArgs, RequestOutput, SamplingParams
from penstock.common.errors import ConfigError
from penstock.engine.plan import Executor, StepHandle, StepPlan
from penstock.interrupt import HeldInterrupt
from tests.tiny_models import random_prompts, reference_tokens

CHECKOUT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "cpu_threads": 1,
    "block_size": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 4 << 20,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
TEXT = "The reservoir fills in the wet months"
CHAT = [{"role": "user", "content": "Why does it fill?"}]


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with sampling defaults and a second end-of-text id, the way chat models have them."""
    path = tmp_path_factory.mktemp("llm") / "model"
    shutil.copytree(checkpoints["qwen2"], path)
    settings = {"temperature": 0.0, "top_k": 7, "repetition_penalty": 1.25}
    (path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1]}))
    return path


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[LLM]:
    llm = LLM(str(model), **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared `LLM`, whose engine must be empty when the test ends."""
    yield shared
    assert_empty(shared)


def assert_empty(llm: LLM) -> None:
    engine = llm._built.engine
    assert not engine.has_work()
    assert (engine.pages.num_held, engine.pages.num_promised) == (0, 0)
    engine.pages.check()


def run(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def tokens(answers: list[RequestOutput]) -> list[list[int]]:
    return [answer.outputs[0].token_ids for answer in answers]


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


def test_every_kind_of_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(TEXT)
    kinds: list[Any] = [TEXT, ids, {"prompt": TEXT}, {"prompt_token_ids": ids}, {"prompt": TEXT, "cache_salt": "a"}]
    together = run(llm, kinds)
    assert [answer.prompt for answer in together] == [TEXT, None, TEXT, None, TEXT]
    alone = [run(llm, kind)[0] for kind in kinds]
    for answer in together + alone:
        assert answer.prompt_token_ids == ids and answer.outputs[0].token_ids == together[0].outputs[0].token_ids
        assert answer.outputs[0].text == llm.get_tokenizer().decode(answer.outputs[0].token_ids)
    assert run(llm, []) == []


def test_a_prefix_is_reused_unless_its_salt_differs(llm: LLM) -> None:
    [prompt] = random_prompts([21], seed=77)
    salted = [{"prompt_token_ids": prompt, "cache_salt": salt} for salt in ("s", "t")]
    first, second, other = run(llm, salted[0])[0], run(llm, salted[0])[0], run(llm, salted[1])[0]
    assert [answer.num_cached_tokens for answer in (first, second, other)] == [0, 20, 0]


def test_a_list_of_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 5)]
    first, second = tokens(run(llm, [TEXT, TEXT], params))
    assert (len(first), len(second)) == (2, 5) and second[:2] == first


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


def test_truncated_prompts(llm: LLM) -> None:
    [prompt] = random_prompts([30], seed=6)
    kept = [
        run(llm, prompt, SamplingParams(max_tokens=1, truncate_prompt_tokens=count))[0].prompt_token_ids
        for count in (7, 200, -1)
    ]
    assert kept == [prompt[-7:], prompt, prompt]
    [long] = random_prompts([300], seed=6)
    [answer] = run(llm, long, SamplingParams(max_tokens=6, truncate_prompt_tokens=-1, ignore_eos=True))
    assert answer.prompt_token_ids == long[-250:] and len(answer.outputs[0].token_ids) == 6
    with pytest.raises(ValueError, match="truncate_prompt_tokens must be at most 256"):
        run(llm, prompt, SamplingParams(truncate_prompt_tokens=257))


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


def test_without_a_tokenizer(llm: LLM, model: Path, tmp_path: Path) -> None:
    """Token ids in, token ids out, from a directory without tokenizer files; what needs text is refused."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(model / name, tmp_path / name)
    bare = LLM(str(tmp_path), skip_tokenizer_init=True, **OPTIONS)
    prompts = random_prompts([5, 21], seed=31)
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, logprobs=1)
    answers, expected = run(bare, prompts, params), run(llm, prompts, params)
    assert tokens(answers) == tokens(expected)
    for ours, theirs in zip(answers, expected, strict=True):
        [output], [reference] = ours.outputs, theirs.outputs
        assert (output.text, output.finish_reason, ours.finished) == ("", "length", True)
        assert output.logprobs is not None and reference.logprobs is not None
        assert [list(at) for at in output.logprobs] == [list(at) for at in reference.logprobs]
        assert {at.decoded_token for found in output.logprobs for at in found.values()} == {None}
    [stopped] = run(bare, [prompts[0]], SamplingParams(temperature=0, stop_token_ids=[tokens(answers)[0][2]]))
    assert (stopped.outputs[0].finish_reason, stopped.num_cached_tokens) == ("stop", 4)
    for prompt, with_text in ((TEXT, GREEDY), ({"prompt": TEXT}, GREEDY), (prompts[0], SamplingParams(stop=["a"]))):
        with pytest.raises(ValueError, match="there is no tokenizer"):
            run(bare, prompt, with_text)
    with pytest.raises(ValueError, match="there is no tokenizer"):
        bare.chat(CHAT, GREEDY)
    assert (bare.max_model_len, bare.vocab_size) == (256, 400)
    assert_empty(bare)
    bare.close()


def test_dummy_weights_need_config_json_only(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    llm = LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, **OPTIONS)
    [first, second] = tokens(run(llm, [[9, 10, 11], [9, 10, 11]]))
    assert len(first) == 12 and first == second
    llm.close()


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


def test_chat_goes_through_the_template(llm: LLM) -> None:
    [answer] = llm.chat(CHAT, GREEDY, use_tqdm=False)
    text = "<|begin|><|user|>Why does it fill?<|end|><|assistant|>"
    assert answer.prompt == text
    assert answer.prompt_token_ids == llm.get_tokenizer().encode(text, add_special_tokens=False)
    assert tokens(run(llm, answer.prompt_token_ids)) == tokens([answer])
    several = llm.chat([CHAT, [*CHAT, {"role": "assistant", "content": "Rain."}]], GREEDY, use_tqdm=False)
    assert tokens(several)[0] == tokens([answer])[0] and len(several) == 2
    [closed] = llm.chat(CHAT, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert closed.prompt == text.removesuffix("<|assistant|>")


def test_chats_as_vllm_programs_write_them(llm: LLM, model: Path, tmp_path: Path) -> None:
    """vLLM's arguments, by position where it takes them so; what is not here is said."""
    template = "{{ tools[0].function.name }}|{{ style }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    options: dict[str, Any] = {"tools": tools, "chat_template_kwargs": {"style": "plain"}}
    [answer] = llm.chat(CHAT, GREEDY, False, None, template, "auto", False, **options)
    assert answer.prompt == "look_up|plain|Why does it fill?"
    assert answer.prompt_token_ids == llm.get_tokenizer().encode(str(answer.prompt), add_special_tokens=False)
    (tmp_path / "template.jinja").write_text(template)
    [same] = llm.chat(CHAT, GREEDY, False, chat_template=str(tmp_path / "template.jinja"), **options)
    assert same.prompt == answer.prompt
    parts = [{"role": "user", "content": [{"type": "text", "text": "Why does it fill?"}]}]
    assert tokens(llm.chat(parts, GREEDY, False)) == tokens(llm.chat(CHAT, GREEDY, False))  # type: ignore[arg-type]
    begun = [*CHAT, {"role": "assistant", "content": "Because"}]
    goes_on: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    [more] = llm.chat(begun, GREEDY, False, **goes_on)
    assert more.prompt is not None and more.prompt.endswith("Because")
    [special] = llm.chat(CHAT, GREEDY, False, tokenization_kwargs={"add_special_tokens": True})
    assert special.prompt_token_ids == llm.get_tokenizer().encode(str(special.prompt))
    for fields, words in (
        ({"lora_request": object()}, "lora_request is not supported"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs is not supported"),
        ({"continue_final_message": True}, "cannot both be true"),
        ({"chat_template": "{% if %}"}, "not valid Jinja|is not valid"),
        ({"chat_template": str(tmp_path / "none")}, "--chat-template"),
        ({"tokenization_kwargs": {"truncation": True}}, "truncation is not supported"),
    ):
        with pytest.raises(ValueError, match=words):
            llm.chat(CHAT, GREEDY, False, **fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("messages[0].content[0]")):
        llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], GREEDY, False)
    own = LLM(str(model), chat_template="{{ messages[0].content }}", **OPTIONS)
    assert own.chat(CHAT, GREEDY, False)[0].prompt == "Why does it fill?"
    own.close()


def test_arguments_and_methods_that_are_not_here_are_said(llm: LLM) -> None:
    for prompt in ({"prompt": "a", "multi_modal_data": {"image": 1}}, {"prompt_embeds": [1.0]}):
        with pytest.raises(ValueError, match="not supported"):
            run(llm, prompt)
    with pytest.raises(ValueError, match="lora_request is not supported"):
        llm.generate(TEXT, GREEDY, lora_request=object())  # type: ignore[arg-type]
    [bare] = llm.generate(TEXT, GREEDY, use_tqdm=False, tokenization_kwargs={"add_special_tokens": False})
    assert bare.prompt_token_ids == llm.get_tokenizer().encode(TEXT, add_special_tokens=False)
    for name in ("embed", "score", "sleep", "collective_rpc"):
        assert not hasattr(llm, name)
        with pytest.raises(AttributeError, match=f"LLM has no {name}: "):
            getattr(llm, name)
    with pytest.raises(AttributeError, match=r"LLM has no generat$"):
        llm.generat(TEXT)  # type: ignore[attr-defined]


def test_outputs_have_vllms_fields_and_progress_is_shown(llm: LLM) -> None:
    bars: list[Any] = []

    def shown(**options: Any) -> Any:
        bars.append(tqdm(**options, file=io.StringIO()))
        return bars[-1]

    [output] = llm.generate(TEXT, GREEDY, use_tqdm=shown)
    assert [(bar.total, bar.n) for bar in bars] == [(1, 1)]
    assert vars(output).keys() == {
        "request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished", "metrics", "lora_request",
        "encoder_prompt", "encoder_prompt_token_ids", "num_cached_tokens", "kv_transfer_params",
    }  # fmt: skip
    assert vars(output.outputs[0]).keys() == {
        "index", "text", "token_ids", "cumulative_logprob", "logprobs", "routed_experts", "finish_reason",
        "stop_reason", "lora_request",
    }  # fmt: skip
    assert output.finished and output.outputs[0].finished()


def test_defaults_come_from_generation_config(llm: LLM, model: Path) -> None:
    defaults = llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.top_k, defaults.repetition_penalty) == (0.0, 7, 1.25)
    assert tokens(llm.generate(TEXT, use_tqdm=False)) == tokens(run(llm, TEXT, defaults))
    neutral = LLM(str(model), generation_config="vllm", **OPTIONS)
    assert neutral.get_default_sampling_params() == SamplingParams()
    neutral.close()


@pytest.mark.parametrize(
    ("prompts", "params", "reason"),
    [
        ("", GREEDY, "from 1 to 255 tokens here, this one has 0"),
        ([TEXT, []], GREEDY, "this one has 0"),
        ([[7] * 256], GREEDY, "this one has 256"),
        ([[7, 400]], GREEDY, "token ids from 0 to 399"),
        ([[-1]], GREEDY, "token ids from 0 to 399"),
        ({}, GREEDY, "needs prompt or prompt_token_ids"),
        ([TEXT, TEXT], [GREEDY], "2 prompts, but 1 sampling parameters"),
        (TEXT, SamplingParams(stop_token_ids=[400], min_tokens=1), "stop_token_ids must hold token ids from 0 to 399"),
    ],
)
def test_what_cannot_be_generated_is_said(llm: LLM, prompts: Any, params: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run(llm, prompts, params)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"n": 0}, "n must be from 1"),
        ({"temperature": -1}, r"temperature must be in \[0, 100\]"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -2}, "top_k must be"),
        ({"min_p": 2}, "min_p must be"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be in \[0.01, 100\]"),
        ({"presence_penalty": 3}, "presence_penalty must be"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 2, "min_tokens": 3}, r"min_tokens must be at most max_tokens \(2\)"),
        ({"stop": [""]}, "stop must be"),
    ],
)
def test_parameters_out_of_range(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SamplingParams(**values)


def test_parameters_as_vllm_programs_write_them() -> None:
    given: Any = {"stop": "ab", "stop_token_ids": None, "bad_words": None, "seed": -1, "logprobs": True}
    params = SamplingParams(**given)
    assert params == SamplingParams(stop=["ab"], logprobs=1) and params.seed is None


def test_messages_that_the_template_refuses(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["qwen2"], tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for template, reason in (("{{ raise_exception('no such role') }}", "no such role"), (None, "no chat template")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        llm = LLM(str(tmp_path), **OPTIONS)
        with pytest.raises(ValueError, match=reason):
            llm.chat(CHAT, GREEDY, use_tqdm=False)
        llm.close()


def test_options_that_do_not_exist_or_do_not_fit(model: Path) -> None:
    for options, words in (
        ({"max_modle_len": 3}, "unknown option max_modle_len; did you mean max_model_len?"),
        ({"x": 3}, "unknown option x; known are attention_backend, block_size"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported: one worker uses one device"),
        ({"quantization": "awq"}, "quantization='awq' is not supported"),
        ({"kv_transport": "shm"}, "kv_transport: for fleets; give prefill_workers or decode_workers"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            LLM(str(model), **options)
    with pytest.raises(ConfigError, match="max_model_len 9999 exceeds the model's context of 2048"):
        LLM(str(model), max_model_len=9999)


def test_what_vllm_programs_say_is_understood(model: Path) -> None:
    args = EngineArgs(str(model), tensor_parallel_size=1, trust_remote_code=True, quantization=None, dtype="float")
    args.options |= OPTIONS
    llm = LLM.from_engine_args(args)
    assert llm.config.dtype == "float32" and len(tokens(run(llm, TEXT))[0]) == 12
    llm.close()


def test_a_long_request_ends_at_the_context(llm: LLM) -> None:
    [prompt] = random_prompts([250], seed=3)
    [output] = run(llm, prompt, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[0].outputs
    assert (len(output.token_ids), output.finish_reason) == (6, "length")
    [output] = run(llm, prompt, SamplingParams(temperature=0, max_tokens=20, min_tokens=20, ignore_eos=True))[0].outputs
    assert len(output.token_ids) == 6


@pytest.mark.parametrize("step", [1, 3, 9])
def test_ctrl_c_in_the_middle_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    prompts = random_prompts([40, 5, 60], seed=6)
    expected = tokens(run(llm, prompts))
    engine, submit = llm._built.engine, llm._built.engine.executor.submit
    before, begun = engine.steps, 0

    def interrupted(plan: StepPlan) -> StepHandle:
        nonlocal begun
        begun += 1
        if begun == step:
            signal.raise_signal(signal.SIGINT)
        return submit(plan)

    monkeypatch.setattr(engine.executor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llm, prompts)
    assert engine.steps - before == begun == step  # the step was finished, and none came after it
    assert_empty(llm)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert tokens(run(llm, prompts)) == expected


def test_an_error_in_the_middle_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(llm._built.engine.executor, "submit", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(llm, [TEXT, "The river"])
    assert_empty(llm)
    assert len(tokens(run(llm, TEXT))[0]) == 12


def test_another_thread_may_generate(llm: LLM) -> None:
    answers: list[list[RequestOutput]] = []
    thread = threading.Thread(target=lambda: answers.append(run(llm, TEXT)))
    thread.start()
    thread.join()
    assert tokens(answers[0]) == tokens(run(llm, TEXT))


def test_a_held_interrupt_goes_to_the_programs_own_handler() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with HeldInterrupt() as held:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert seen == []
            held.deliver()
            assert seen == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)
        assert len(seen) == 2
        signal.raise_signal(signal.SIGINT)
        assert len(seen) == 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_old_objects_are_left_alone_while_it_generates(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, frozen = llm.engine.executor.submit, []

    def noting(plan: StepPlan) -> StepHandle:
        frozen.append(gc.get_freeze_count())
        return submit(plan)

    monkeypatch.setattr(llm.engine.executor, "submit", noting)
    assert gc.get_freeze_count() == 0
    run(llm, TEXT)
    assert min(frozen) > 10000 and gc.get_freeze_count() == 0
    gc.freeze()
    try:
        run(llm, TEXT)
        assert gc.get_freeze_count() > 0  # the program's own doing
    finally:
        gc.unfreeze()


class _Late:
    """An executor that computes at once and tells a step late, as one on a GPU does."""

    run_ahead = 1

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, plan: StepPlan) -> StepHandle:
        return self._executor.submit(plan)

    def close(self) -> None:
        self._executor.close()


def test_steps_in_flight_at_the_end_leave_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop is noticed while the next step computes; the next call must not see anything of it."""
    prompts = random_prompts([3, 21, 40], seed=5)
    plain = tokens(run(llm, prompts))
    stops = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[ids[4]]) for ids in plain]
    text = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=[run(llm, TEXT)[0].outputs[0].text[3:5]])
    expected = [tokens(run(llm, prompts, params)) for params in (GREEDY, stops)] + [tokens(run(llm, TEXT, text))]
    monkeypatch.setattr(llm.engine, "executor", _Late(llm.engine.executor))
    for wanted, params in zip(expected, (GREEDY, stops), strict=False):
        assert tokens(run(llm, prompts, params)) == wanted
        assert_empty(llm)
    assert tokens(run(llm, TEXT, text)) == expected[2]
    assert_empty(llm)


def test_importing_penstock_imports_no_torch() -> None:
    program = (
        "import sys, penstock; assert 'torch' not in sys.modules; from penstock import SamplingParams;"
        "assert 'torch' not in sys.modules; from penstock import LLM; assert 'torch' in sys.modules; print(LLM)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "<class 'penstock.llm.LLM'>\n"), done.stderr
