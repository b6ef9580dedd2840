"""POST /v1/messages and /v1/messages/count_tokens as Anthropic's own client calls them, over a scripted worker."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import anthropic
import msgspec
import pytest

from penstock.common.errors import (
    BadRequest,
    InternalError,
    NotFound,
    Overloaded,
    PenstockError,
    QueueTimeout,
    Timeout,
    Unauthorized,
    WorkerLost,
)
from penstock.router.answer_format import CallDelta, Delta, Said, Usage
from penstock.router.anthropic.answer import MessagesFormat, anthropic_error
from penstock.router.anthropic.request import MessagesRequest
from tests.router.fake_router import ANSWER, CONTEXT, SPANS, Router, ids_of, running, say
from tests.tiny_tokenizers import byte_level

USER: Any = {"role": "user", "content": "Hello?"}
PROMPT = "<s><|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def client(router: Router) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=router.url, api_key="any", max_retries=0, timeout=60) as client:
        yield client


def create(client: anthropic.Anthropic, **fields: Any) -> Any:
    return client.messages.create(**{"model": "tiny", "max_tokens": 100, "messages": [USER], **fields})


def prompt_of(router: Router) -> str:
    return byte_level().decode(router.last.prompt_token_ids, skip_special_tokens=False)


def test_whole_message(router: Router, client: anthropic.Anthropic) -> None:
    message = create(client)
    assert message.id.startswith("msg_") and (message.type, message.role, message.model) == (
        "message", "assistant", "tiny",
    )  # fmt: skip
    [block] = message.content
    assert (block.type, block.text) == ("text", ANSWER)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert prompt_of(router) == PROMPT and router.last.sampling.max_tokens == 100
    usage = message.usage
    assert usage.cache_read_input_tokens == SPANS.cached_tokens
    assert usage.input_tokens + SPANS.cached_tokens == len(ids_of(PROMPT))
    assert usage.output_tokens == len(ids_of(ANSWER)) + 1


@pytest.mark.parametrize("step", [1, 1000])
def test_stream_is_the_whole_message(router: Router, client: anthropic.Anthropic, step: int) -> None:
    whole = create(client)
    router.service.step = step
    with client.messages.stream(model="tiny", max_tokens=100, messages=[USER]) as stream:
        events = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert events[0] == "message_start" and events[-2:] == ["message_delta", "message_stop"]
    assert events.count("content_block_start") == events.count("content_block_stop") == 1
    streamed, in_one = (message.model_dump(exclude={"id", "parsed_output"}) for message in (final, whole))
    assert [block["text"] for block in streamed.pop("content")] == [block["text"] for block in in_one.pop("content")]
    assert streamed == in_one


def test_stream_begins_with_its_input_tokens(client: anthropic.Anthropic) -> None:
    first, *_ = create(client, stream=True)
    assert first.message.usage.input_tokens == len(ids_of(PROMPT)) and first.message.content == []


@pytest.mark.parametrize("stream", [False, True])
def test_why_it_stopped(router: Router, client: anthropic.Anthropic, stream: bool) -> None:
    def stops(**fields: Any) -> tuple[Any, Any]:
        answer = create(client, stream=stream, **fields)
        ended = next(event.delta for event in answer if event.type == "message_delta") if stream else answer
        return ended.stop_reason, ended.stop_sequence

    assert stops() == ("end_turn", None)
    assert stops(stop_sequences=["never", "water"]) == ("stop_sequence", "water")
    assert stops(max_tokens=3) == ("max_tokens", None)
    router.service.script = say("a", stop_reason=9)
    assert stops() == ("end_turn", None)


def test_sampling_fields(router: Router, client: anthropic.Anthropic) -> None:
    extra = {"seed": 7, "min_p": 0.1, "cache_salt": "pepper", "priority": 3}
    extra |= {"temperature": 0.5, "top_p": 0.9, "top_k": 3}  # no longer the client's own, but still the API's
    create(client, stop_sequences=["x"], extra_body=extra)
    sampling = router.last.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 3, 0.1)
    assert (sampling.seed, sampling.stop) == (7, ["x"])
    assert (router.last.cache_salt, router.last.priority) == ("pepper", 3)


def test_system_prompt_and_turns(router: Router, client: anthropic.Anthropic) -> None:
    billing = {"type": "text", "text": "x-anthropic-billing-header: changes=always"}
    be_brief = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Three"}]},
        USER,
    ]
    create(client, system=[billing, be_brief], messages=turns)
    parts = ["<s><|im_start|>system\nBe brief.<|im_end|>", "<|im_start|>user\nOne\ntwo<|im_end|>"]
    parts += ["<|im_start|>assistant\nThree<|im_end|>", PROMPT.removeprefix("<s>")]
    assert prompt_of(router) == "\n".join(parts)
    create(client, system="Be brief.", messages=turns)
    assert prompt_of(router) == "\n".join(parts)


def test_a_begun_answer_is_continued(router: Router, client: anthropic.Anthropic) -> None:
    create(client, messages=[USER, {"role": "assistant", "content": "The answer is"}])
    assert prompt_of(router) == PROMPT + "The answer is"


def test_thinking_reaches_the_template() -> None:
    with (
        running(template="{{ enable_thinking }} {{ thinking }}") as router,
        anthropic.Anthropic(base_url=router.url, api_key="any", max_retries=0, timeout=60) as client,
    ):
        create(client, thinking={"type": "disabled"})
        assert prompt_of(router) == "False False"
        create(client, thinking={"type": "enabled", "budget_tokens": 1024})
        assert prompt_of(router) == "True True"
        kwargs = {"chat_template_kwargs": {"thinking": "more"}}
        create(client, thinking={"type": "enabled", "budget_tokens": 1024}, extra_body=kwargs)
        assert prompt_of(router) == "True more"


def test_count_tokens(router: Router, client: anthropic.Anthropic) -> None:
    before = len(router.service.requests)
    count = client.messages.count_tokens(model="tiny", messages=[USER])
    assert count.input_tokens == len(ids_of(PROMPT)) and len(router.service.requests) == before
    longer = client.messages.count_tokens(model="tiny", system="Be brief.", messages=[USER])
    assert longer.input_tokens == len(ids_of("<s><|im_start|>system\nBe brief.<|im_end|>\n" + PROMPT[3:]))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "a", "input": {}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]},
            "messages[1].content[0]",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"messages": [{"role": "user", "content": "the water falls " * 300}]}, "length is 512 tokens"),
        ({"max_tokens": CONTEXT}, "maximum context length"),
    ],
    ids=str,
)
def test_mistakes_are_named(client: anthropic.Anthropic, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(client, **fields)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert named in body["error"]["message"]


def test_other_errors(router: Router, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        create(client, model="gpt-0")
    router.service.refusal = Overloaded("full")
    with pytest.raises(anthropic.RateLimitError):
        create(client)
    answer = router.http.get("/v1/messages/batches")
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"
    answer = router.http.post("/v1/messages", content=b"{")
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_failure_in_a_stream_is_an_error_event(router: Router, client: anthropic.Anthropic) -> None:
    text = say("abc")
    router.service.script = lambda request: [*text(request)[:2], WorkerLost("gone")]
    seen = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        for event in create(client, stream=True):
            seen.append(event.type)
    assert "content_block_delta" in seen and "message_stop" not in seen
    assert caught.value.body == {"type": "error", "error": {"type": "overloaded_error", "message": "gone"}}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadRequest("a"), "invalid_request_error"),
        (Unauthorized("a"), "authentication_error"),
        (NotFound("a"), "not_found_error"),
        (Overloaded("a"), "rate_limit_error"),
        (QueueTimeout("a"), "overloaded_error"),
        (Timeout("a"), "timeout_error"),
        (InternalError("a"), "api_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PenstockError) else "",
)
def test_error_types(error: PenstockError, kind: str) -> None:
    assert json.loads(anthropic_error(error))["error"]["type"] == kind


def test_keys() -> None:
    with running(api_key=("sk-one",)) as router:
        for given in ({"api_key": "sk-one"}, {"auth_token": "sk-one"}):
            with anthropic.Anthropic(base_url=router.url, max_retries=0, timeout=60, **given) as client:  # type: ignore[arg-type]
                assert create(client).content
        wrong = anthropic.Anthropic(base_url=router.url, api_key="sk-two", max_retries=0, timeout=60)
        with wrong as client, pytest.raises(anthropic.AuthenticationError) as caught:
            create(client)
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


@pytest.mark.parametrize("step", [1, 1000])
def test_reasoning_and_a_call(step: int) -> None:
    call = '<tool_call>{"name": "rain", "arguments": {"place": "Bergen"}}</tool_call>'
    tool: Any = {"name": "rain", "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}}}
    options: Any = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "deepseek_r1"}
    with (
        running(**options) as router,
        anthropic.Anthropic(base_url=router.url, api_key="any", max_retries=0, timeout=60) as client,
    ):
        router.service.script, router.service.step = say(f"Hmm.</think>Let me see.{call}"), step
        whole = create(client, tools=[tool])
        with client.messages.stream(model="tiny", max_tokens=100, messages=[USER], tools=[tool]) as stream:
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            thought, text, use = message.content
            assert (thought.thinking, text.text, message.stop_reason) == ("Hmm.", "Let me see.", "tool_use")
            assert (use.name, use.input) == ("rain", {"place": "Bergen"}) and use.id
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "wet"}
        turns = [USER, {"role": "assistant", "content": streamed.content}, {"role": "user", "content": [result]}]
        create(client, tools=[tool], messages=turns)
        assert "wet<|im_end|>" in prompt_of(router)
        create(client, tools=[tool], thinking={"type": "disabled"})


# ------------------------------------------------------------ what the scripted worker cannot say


def test_tools_and_results_become_chats() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "rain", "input": {"place": "Bergen"}}
    thought = {"type": "thinking", "thinking": "Ask.", "signature": ""}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "wet"}]}
    failed = {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True}
    body = {
        "max_tokens": 5,
        "messages": [
            {"role": "assistant", "content": [thought, {"type": "text", "text": "Let me see."}, call]},
            {"role": "user", "content": [{"type": "text", "text": "And?"}, result, failed]},
        ],
        "tools": [{"name": "rain", "description": "Rain.", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    }
    request = msgspec.convert(body, MessagesRequest)
    request.check()
    fields = request._chat_fields()
    function = {"name": "rain", "arguments": '{"place":"Bergen"}'}
    assert fields["messages"] == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning": "Ask.",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": [{"type": "text", "text": "wet"}]},
        {"role": "tool", "tool_call_id": "t1", "content": "Error: no"},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]
    assert fields["tools"] == [
        {"type": "function", "function": {"name": "rain", "description": "Rain.", "parameters": {"type": "object"}}}
    ]
    assert (fields["tool_choice"], fields["parallel_tool_calls"]) == ("required", False)
    assert fields["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert fields["reasoning_effort"] == "low" and fields["continue_final_message"] is None
    body |= {"tool_choice": {"type": "tool", "name": "rain"}}
    assert msgspec.convert(body, MessagesRequest)._chat_fields()["tool_choice"]["function"] == {"name": "rain"}


def told(deltas: Sequence[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the events of a stream, the message in one piece) for what a choice says."""
    text: Any = SimpleNamespace(stop_reason=None)
    choice: Any = SimpleNamespace(text=text, cached_tokens=0, request=SimpleNamespace(prompt_token_ids=[1, 2, 3]))
    format, said, usage = MessagesFormat("msg_1", "tiny"), Said(), Usage(3, 9, 2)
    parts = [format.opening(choice)]
    for delta in deltas:
        parts.append(format.delta(choice, delta, None))
        said.add(delta)
    parts.append(format.closing(usage, None))
    events = [part.partition(b"data: ")[2] for part in b"".join(parts).split(b"\n\n") if part]
    return list(map(json.loads, events)), json.loads(
        MessagesFormat("msg_1", "tiny").whole([choice], [said], usage, None)
    )


def test_thinking_text_and_calls_are_blocks() -> None:
    deltas = [
        Delta(reasoning="Hm"),
        Delta(reasoning="m.", content="Let "),
        Delta(content="me see."),
        Delta(calls=[CallDelta(0, call_id="c0", name="rain"), CallDelta(0, '{"place":')]),
        Delta(calls=[CallDelta(0, '"Bergen"}'), CallDelta(1, "{", "c1", "wind")]),
        Delta(finish_reason="tool_calls"),
    ]
    events, whole = told(deltas)
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_delta":
            block, delta = blocks[event["index"]], event["delta"]
            for field, kind in (("thinking", "thinking"), ("text", "text"), ("json", "input_json")):
                if delta["type"] == f"{kind}_delta":
                    block[field] += delta.get(field, delta.get("partial_json"))
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
    assert (blocks[0]["thinking"], blocks[1]["text"]) == ("Hmm.", "Let me see.")
    assert (blocks[2]["id"], blocks[2]["name"], blocks[2]["json"]) == ("c0", "rain", '{"place":"Bergen"}')
    assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "tool_use"
    assert events[-2]["usage"] == whole["usage"]
    assert [block["type"] for block in whole["content"]] == [block["type"] for block in blocks]
    assert whole["content"][2]["input"] == {"place": "Bergen"}
    assert whole["content"][3]["input"] == {"INVALID_JSON": "{"}  # cut by max_tokens
    assert whole["usage"]["input_tokens"] == 1 and whole["usage"]["cache_read_input_tokens"] == 2
