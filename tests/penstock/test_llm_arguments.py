"""What the offline `LLM` takes, as vLLM's users write it, and what it says of the rest."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from penstock import LLM, EngineArgs, SamplingParams
from penstock.common.config import ServeConfig
from penstock.common.errors import ConfigError
from tests.penstock.offline import CHAT, GREEDY, OPTIONS, TEXT, assert_empty, run, tokens
from tests.tiny_models import random_prompts


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


def test_a_list_of_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 5)]
    first, second = tokens(run(llm, [TEXT, TEXT], params))
    assert (len(first), len(second)) == (2, 5) and second[:2] == first


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


def test_options_that_do_not_exist_or_do_not_fit(model: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"max_modle_len": 3}, "unknown option max_modle_len; did you mean max_model_len?"),
        ({"x": 3}, "unknown option x; known are attention_backend, block_size"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported: one worker uses one device"),
        ({"quantization": "awq"}, "quantization='awq' is not supported"),
        ({"kv_transport": "shm"}, "kv_transport: for fleets; give prefill_workers or decode_workers"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            LLM(str(model), **options)
    for file in model.glob("*.json"):  # no weights: what they do not decide is refused before they are looked for
        shutil.copy(file, tmp_path)
    with pytest.raises(ConfigError, match="max_model_len 9999 exceeds the model's context of 2048"):
        LLM(str(tmp_path), max_model_len=9999)


def test_what_vllm_programs_say_is_understood(model: Path) -> None:
    args = EngineArgs(str(model), tensor_parallel_size=1, trust_remote_code=True, quantization=None, dtype="float")
    args.options |= OPTIONS
    llm = LLM.from_engine_args(args)
    assert llm.config.dtype == "float32" and len(tokens(run(llm, TEXT))[0]) == 12
    llm.close()


def test_none_is_the_default_and_paths_are_paths(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"tokenizer": model, "seed": None, "dtype": None, **OPTIONS}
    llm = LLM(model, decode_workers=None, **given)
    assert (llm.config.model, llm.config.seed, llm.config.dtype) == (str(model), 0, "auto")
    assert len(tokens(run(llm, TEXT))[0]) == 12
    llm.close()

    class Taken(Exception):
        pass

    def take(config: ServeConfig) -> None:
        raise Taken(config)

    monkeypatch.setattr("penstock.fleet_llm.FleetThread", take)
    with pytest.raises(Taken) as taken:
        LLM(model, decode_workers=1, **given)
    config = taken.value.args[0]
    assert (config.model, config.tokenizer, config.seed, config.dtype) == (str(model), str(model), 0, "auto")
