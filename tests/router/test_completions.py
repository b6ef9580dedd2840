"""POST /v1/completions as users call it: the openai client against a real server over a scripted worker."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

import pytest

from penstock.common.generation_defaults import GenerationDefaults
from tests.router.fake_router import ANSWER, CONTEXT, SPANS, Router, ids_of, running, say
from tests.tiny_tokenizers import byte_level

LENGTH = len(ids_of(ANSWER))


def create(router: Router, **fields: Any) -> Any:
    return router.openai.completions.create(**{"model": "tiny", "prompt": "the water", "max_tokens": 99, **fields})


def test_whole_answer_with_usage(router: Router) -> None:
    answer = create(router)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny"
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.stop_reason, choice.logprobs) == (ANSWER, "stop", None, None)
    assert answer.usage.prompt_tokens == len(router.last.prompt_token_ids) == len(ids_of("the water"))
    assert answer.usage.completion_tokens == LENGTH + 1  # the end of sequence counts
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_of_a_prompt_no_more_is_cached_than_it_has(router: Router) -> None:
    """A worker that takes a request over finds the output that another one has left there, too."""
    usage = create(router, prompt=[5, 6]).usage
    assert usage.prompt_tokens == usage.prompt_tokens_details.cached_tokens == 2 < SPANS.cached_tokens


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_stream_joins_to_the_whole_answer(router: Router, step: int) -> None:
    router.service.step = step
    chunks = list(create(router, stream=True))
    texts = [chunk.choices[0].text for chunk in chunks]
    assert "".join(texts) == ANSWER
    assert not any("\ufffd" in text for text in texts) and "😀" in "".join(texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].usage is None


def test_stream_usage(router: Router) -> None:
    *chunks, last = create(router, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == LENGTH + 1
    assert last.usage.prompt_tokens_details.cached_tokens == 3
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c.usage.completion_tokens for c in create(router, stream=True, stream_options=options)]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == LENGTH + 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a b", [ids_of("a b")]),
        (["a", "b c"], [ids_of("a"), ids_of("b c")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_kinds_of_prompts(router: Router, prompt: Any, expected: list[list[int]]) -> None:
    answer = create(router, prompt=prompt)
    assert [request.prompt_token_ids for request in router.service.requests] == expected
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))
    assert answer.usage.prompt_tokens == sum(map(len, expected))
    assert len({request.request_id for request in router.service.requests}) == len(expected)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices_are_ordered_by_prompt(router: Router, stream: bool) -> None:
    router.service.script = lambda r: say(f"{r.prompt_token_ids[0]}/{r.choice}")(r)
    answer = create(router, prompt=[[5], [6, 7]], n=2, stream=stream)
    texts = ["", "", "", ""]
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == ["5/0", "5/1", "6/0", "6/1"]
    if not stream:
        assert answer.usage.prompt_tokens == 3  # a prompt counts once, not once a choice
        assert answer.usage.completion_tokens == 4 * 4
    seeds = [request.sampling.seed for request in router.service.requests]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


@pytest.mark.parametrize("seed", [7, -1, None])
def test_equal_prompts_have_seeds_of_their_own_but_for_the_clients(router: Router, seed: int | None) -> None:
    create(router, prompt=["the water"] * 3, seed=seed)
    seeds = {request.sampling.seed for request in router.service.requests}
    assert seeds == {7} if seed == 7 else len(seeds - {-1, None}) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["the water ", ids_of("the water ")])
def test_echo(router: Router, stream: bool, prompt: Any) -> None:
    answer = create(router, prompt=prompt, echo=True, stream=stream)
    text = "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text
    assert text == "the water " + ANSWER


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize(
    ("stop", "include", "expected", "reason"),
    [
        ("wörld", False, "Hello 😀 ", "wörld"),
        ("wörld", True, "Hello 😀 wörld", "wörld"),
        (["zzz", "o 😀 w", "the"], False, "Hell", "o 😀 w"),
        ("absent", False, ANSWER, None),
        ("falls.!", False, ANSWER, None),
    ],
)
def test_stop_strings(
    router: Router, stream: bool, step: int, stop: Any, include: bool, expected: str, reason: str | None
) -> None:
    router.service.step = step
    options = {"stream_options": {"include_usage": True}} if stream else {}
    extra = {"include_stop_str_in_output": include}
    answer = create(router, stop=stop, stream=stream, extra_body=extra, **options)
    parts = list(answer) if stream else [answer]
    assert "".join(c.choices[0].text for c in parts if c.choices) == expected
    last = [c for c in parts if c.choices][-1].choices[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", reason)
    ids, kept = ids_of(ANSWER), 0
    while reason is not None and reason not in byte_level().decode(ids[:kept]):
        kept += 1
    assert parts[-1].usage.completion_tokens == (kept if reason else LENGTH + 1)
    assert router.service.cancelled == ([(router.last.request_id, 0)] if reason else [])


def test_stop_token_and_length(router: Router) -> None:
    router.service.script = say("ab", stop_reason=2)
    assert create(router).choices[0].stop_reason == 2
    router.service.script = say(ANSWER)
    answer = create(router, max_tokens=3)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3
    assert answer.choices[0].text == byte_level().decode(ids_of(ANSWER)[:3])


@pytest.mark.parametrize("stream", [False, True])
def test_special_tokens_are_hidden_unless_asked_for(router: Router, stream: bool) -> None:
    router.service.script = say("a<|im_start|>b")
    for skip, expected in ((None, "ab"), (False, "a<|im_start|>b")):
        answer = create(router, stream=stream, extra_body={"skip_special_tokens": skip})
        text = "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text
        assert text == expected


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(router: Router, stream: bool) -> None:
    router.service.script = say("ab😀")
    answer = create(router, logprobs=3, stream=stream)
    entries = [c.choices[0].logprobs for c in (answer if stream else [answer])]
    tokens = [t for entry in entries for t in entry.tokens]
    offsets = [o for entry in entries for o in entry.text_offset]
    top = [t for entry in entries for t in entry.top_logprobs]
    assert tokens == ["a", "b", *["\ufffd"] * 4, "<|im_end|>"]
    assert offsets == [0, 1, 2, 2, 2, 2, 3]
    assert [p for entry in entries for p in entry.token_logprobs] == [-0.5] * 7
    assert top[0] == {"a": -0.5, byte_level().token_text(5): -0.25, byte_level().token_text(7): -3.0}


def test_logprobs_of_zero_and_of_minus_infinity(router: Router) -> None:
    router.service.script = say("a")
    assert create(router, logprobs=0).choices[0].logprobs.top_logprobs[0] == {"a": -0.5}
    assert min(create(router, logprobs=4).choices[0].logprobs.top_logprobs[0].values()) == -9999.0


def test_sampling_fields_reach_the_worker(router: Router) -> None:
    extra = {
        "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [9],
        "ignore_eos": True, "cache_salt": "s", "an_unknown_field": {"x": 1}, "user": "u",
    }  # fmt: skip
    create(
        router, temperature=0.5, top_p=0.9, seed=11, presence_penalty=0.5, frequency_penalty=-0.5, max_tokens=9,
        extra_body=extra,
    )  # fmt: skip
    sampling = router.last.sampling
    for name in ("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos"):
        assert getattr(sampling, name) == extra[name]
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 11)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.max_tokens) == (0.5, -0.5, 9)
    assert (sampling.n, sampling.logprobs) == (1, None)
    assert (router.last.cache_salt, router.last.eos_token_ids) == ("s", [2])


def test_defaults_of_the_api(router: Router) -> None:
    router.post("/v1/completions", {"prompt": "a"})
    assert (router.last.sampling.max_tokens, router.last.sampling.temperature) == (16, 1.0)
    seeds = [router.last.sampling.seed]
    router.post("/v1/completions", {"prompt": "a", "max_tokens": None, "temperature": None, "stop": None, "n": None})
    assert router.last.sampling.max_tokens == 16
    assert router.last.sampling.seed not in seeds  # drawn anew
    router.post("/v1/completions", {"prompt": "a", "max_tokens": 5, "max_completion_tokens": 6})
    assert router.last.sampling.max_tokens == 6


def test_defaults_of_the_model_and_of_the_router() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_k=20, max_new_tokens=50)
    with running(defaults=defaults, seed=5) as first, running(seed=5) as second:
        create(first)
        assert (first.last.sampling.temperature, first.last.sampling.top_k) == (0.6, 20)
        create(first, temperature=0.0)
        assert first.last.sampling.greedy
        first.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
        assert first.last.sampling.max_tokens == 50
        create(second)
        assert second.last.sampling.seed == first.service.requests[0].sampling.seed


def test_prompt_that_fills_the_context(router: Router) -> None:
    create(router, prompt=[5] * (CONTEXT - 16), max_tokens=16)
    assert len(router.last.prompt_token_ids) == CONTEXT - 16
    response = router.post("/v1/completions", {"prompt": [5] * (CONTEXT - 15)})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert f"maximum context length is {CONTEXT} tokens" in error["message"]
    assert f"requested {CONTEXT + 1} tokens ({CONTEXT - 15} in the prompt, 16 for the completion)" in error["message"]


def test_long_text_is_tokenised_too(router: Router) -> None:
    text = "the water " * 500
    error = router.post("/v1/completions", {"prompt": text}).json()["error"]
    assert f"({len(ids_of(text))} in the prompt" in error["message"]


def test_token_ids_on_request(router: Router) -> None:
    wanted = {"return_token_ids": True, "stop": "the"}
    whole = create(router, prompt=[7, 8], extra_body=wanted).choices[0]
    assert whole.prompt_token_ids == [7, 8]
    assert whole.token_ids == ids_of(ANSWER)[: len(whole.token_ids)]
    chunks = router.openai.completions.create(model="tiny", prompt=[7, 8], stream=True, extra_body=wanted)
    assert [i for chunk in chunks for i in chunk.choices[0].token_ids] == whole.token_ids


def test_prompt_logprobs_in_the_form_of_vllm(router: Router) -> None:
    body = {"prompt": [7, 9, 30], "prompt_logprobs": 2, "return_token_ids": True}
    [choice] = router.post("/v1/completions", body).json()["choices"]
    name = byte_level().token_text
    assert choice["prompt_token_ids"] == [7, 9, 30] and choice["logprobs"] is None
    first, second, third = choice["prompt_logprobs"]
    lowest = {"logprob": -9999.0, "rank": 2, "decoded_token": name(8)}
    assert first is None
    assert second == {"9": {"logprob": -1.0, "rank": 3, "decoded_token": name(9)}, "8": lowest}
    assert third == {
        "30": {"logprob": -2.0, "rank": 3, "decoded_token": name(30)},
        "9": {"logprob": -0.5, "rank": 1, "decoded_token": name(9)},
        "8": lowest,
    }
    chat = {"messages": [{"role": "user", "content": "a"}], "prompt_logprobs": 0, "return_token_ids": True}
    answer = router.post("/v1/chat/completions", chat).json()
    assert answer["prompt_token_ids"] == router.last.prompt_token_ids
    assert [None if at is None else list(at) for at in answer["prompt_logprobs"]] == [
        None, *([str(token)] for token in router.last.prompt_token_ids[1:])
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(router: Router, stream: bool) -> None:
    """Prompt and output in the same four lists, and offsets that go on."""
    prompt = "The water"
    ids = byte_level().encode(prompt)
    fields = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 3, "stream": stream}
    answer = router.post("/v1/completions", fields)
    if stream:
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert events.pop() == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
    else:
        choices = answer.json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    joined: dict[str, list[Any]] = {}
    for choice in choices:
        for name, values in (choice["logprobs"] or {}).items():
            joined.setdefault(name, []).extend(values)
    assert router.last.sampling.prompt_logprobs == 1
    tokens = [byte_level().token_text(token) for token in ids]
    assert joined["tokens"][: len(ids)] == tokens and "".join(joined["tokens"]) == text
    assert joined["token_logprobs"] == [None, *(-float(i) for i in range(1, len(ids))), *[-0.5] * 3]
    assert joined["top_logprobs"][0] is None and len(joined["top_logprobs"]) == len(ids) + 3
    assert joined["text_offset"] == [0, *accumulate(map(len, joined["tokens"]))][:-1]


def test_offsets_in_an_echo_are_those_of_the_shown_text(router: Router) -> None:
    """A special token that the echo leaves out has no length; one that the client wrote has."""
    special, *ids = byte_level().encode("<s>The water", add_special_tokens=False)
    fields = {"echo": True, "logprobs": 0, "max_tokens": 3}
    for prompt, length in (([special, *ids], 0), ("<s>The water", 3)):
        choice = router.post("/v1/completions", {"prompt": prompt, **fields}).json()["choices"][0]
        found = choice["logprobs"]
        assert found["tokens"][0] == "<s>" and choice["text"].startswith("<s>"[:length] + "The water")
        lengths = [length, *map(len, found["tokens"][1:])]
        assert found["text_offset"] == [0, *accumulate(lengths)][:-1]


def test_offsets_in_an_echo_of_characters_that_several_tokens_share(router: Router) -> None:
    prompt = "水 😀 the water"
    choice = router.post("/v1/completions", {"prompt": prompt, "echo": True, "logprobs": 0}).json()["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    for token in (" the", " water"):
        assert offsets[tokens.index(token)] == prompt.index(token)


def test_truncated_prompts_and_priority(router: Router) -> None:
    ids = list(range(10, 40))
    for fields, expected in (
        ({"truncate_prompt_tokens": 4}, ids[-4:]),
        ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, ids[:4]),
        ({"truncate_prompt_tokens": 99}, ids),
    ):
        answer = router.post("/v1/completions", {"prompt": ids, "echo": True, "priority": -2, **fields}).json()
        assert router.last.prompt_token_ids == expected and router.last.priority == -2
        assert answer["usage"]["prompt_tokens"] == len(expected)
        assert answer["choices"][0]["text"].startswith(byte_level().decode(expected))
    long = [5] * (CONTEXT + 100)
    router.post("/v1/completions", {"prompt": long, "truncate_prompt_tokens": -1, "max_tokens": 12})
    assert len(router.last.prompt_token_ids) == CONTEXT - 12
    router.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 3000}], "truncate_prompt_tokens": 7}
    )
    assert len(router.last.prompt_token_ids) == 7


def test_prompt_logprobs_do_not_stream(router: Router) -> None:
    answer = router.post("/v1/completions", {"prompt": "a", "prompt_logprobs": 1, "stream": True})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt_logprobs"
