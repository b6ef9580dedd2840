"""POST /v1/chat/completions as users call it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.router.fake_router import ANSWER, CONTEXT, Router, ids_of, running, say
from tests.tiny_tokenizers import byte_level

USER = {"role": "user", "content": "Hello?"}
PROMPT = "<s><|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"


def create(router: Router, **fields: Any) -> Any:
    return router.openai.chat.completions.create(**{"model": "tiny", "messages": [USER], **fields})


def prompt_of(router: Router) -> str:
    return byte_level().decode(router.last.prompt_token_ids, skip_special_tokens=False)


def test_whole_answer(router: Router) -> None:
    answer = create(router)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert prompt_of(router) == PROMPT
    assert router.last.prompt_token_ids == ids_of(PROMPT)
    assert router.last.sampling.max_tokens == CONTEXT - len(ids_of(PROMPT))
    assert answer.usage.prompt_tokens == len(ids_of(PROMPT))
    assert answer.usage.completion_tokens == len(ids_of(ANSWER)) + 1


@pytest.mark.parametrize("step", [1, 4, 1000])
@pytest.mark.parametrize("n", [1, 3])
def test_stream(router: Router, step: int, n: int) -> None:
    router.service.step = step
    texts, reasons, roles = [""] * n, [None] * n, [[] for _ in range(n)]
    for chunk in create(router, stream=True, n=n):
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            assert reasons[choice.index] is None  # nothing after the reason
            roles[choice.index].append(choice.delta.role)
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [ANSWER] * n and reasons == ["stop"] * n
    assert all(role[0] == "assistant" and not any(role[1:]) for role in roles)
    assert [request.choice for request in router.service.requests] == list(range(n))
    assert len({request.request_id for request in router.service.requests}) == 1


def test_stream_usage_with_choices(router: Router) -> None:
    *_, last = create(router, stream=True, n=2, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.prompt_tokens == len(ids_of(PROMPT))
    assert last.usage.completion_tokens == 2 * (len(ids_of(ANSWER)) + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string(router: Router, stream: bool) -> None:
    answer = create(router, stop=["water"], stream=stream)
    parts = list(answer) if stream else [answer]
    text = "".join((c.choices[0].delta if stream else c.choices[0].message).content for c in parts)
    assert text == "Hello 😀 wörld, the "
    assert parts[-1].choices[0].finish_reason == "stop" and parts[-1].choices[0].stop_reason == "water"
    assert router.service.cancelled == [(router.last.request_id, 0)]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(router: Router, stream: bool) -> None:
    router.service.script = say("a😀")
    answer = create(router, logprobs=True, top_logprobs=2, stream=stream)
    parts = list(answer) if stream else [answer]
    content = [entry for c in parts if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert b"".join(bytes(entry.bytes) for entry in content[:-1]).decode() == "a😀"
    assert content[0].token == "a" and content[0].logprob == -0.5
    assert [top.logprob for top in content[0].top_logprobs] == [-0.25, -0.5]
    assert content[0].top_logprobs[1].token == "a"
    assert len(content) == 6


def test_logprobs_without_top(router: Router) -> None:
    content = create(router, logprobs=True).choices[0].logprobs.content
    assert content[0].top_logprobs == [] and router.last.sampling.logprobs == 0
    assert create(router).choices[0].logprobs is None and router.last.sampling.logprobs is None


def test_prompt_options(router: Router) -> None:
    create(router, extra_body={"add_generation_prompt": False})
    assert prompt_of(router) == "<s><|im_start|>user\nHello?<|im_end|>\n"
    begun = {"role": "assistant", "content": "The answer is"}
    body = {"continue_final_message": True, "add_generation_prompt": False}
    create(router, messages=[USER, begun], extra_body=body)
    assert prompt_of(router) == PROMPT + "The answer is"
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    create(router, messages=[{"role": "user", "content": parts}])
    assert "user\nHel\nlo<|im_end|>" in prompt_of(router)


def test_template_variables_and_refusals() -> None:
    refusal = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    template = refusal + "{{ mood }} {{ messages | length }}"
    with running(template=template) as router:
        create(router, extra_body={"chat_template_kwargs": {"mood": "calm"}})
        assert prompt_of(router) == "calm 1"
        error = router.post("/v1/chat/completions", {"messages": [{"role": "system", "content": ""}]})
        assert error.status_code == 400 and "user first" in error.json()["error"]["message"]
    with running(template="") as router:
        error = router.post("/v1/chat/completions", {"messages": [USER]})
        assert error.status_code == 400 and "no chat template" in error.json()["error"]["message"]


def test_long_conversation_is_a_400_with_both_numbers(router: Router) -> None:
    messages = [{"role": "user", "content": "the water falls " * 300}]
    response = router.post("/v1/chat/completions", {"messages": messages})
    error = response.json()["error"]
    prompt_tokens = len(ids_of(f"<s><|im_start|>user\n{messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"))
    assert response.status_code == 400 and error["param"] == "messages"
    assert f"length is {CONTEXT} tokens" in error["message"]
    assert f"requested {prompt_tokens + 1} tokens ({prompt_tokens} in the prompt" in error["message"]
