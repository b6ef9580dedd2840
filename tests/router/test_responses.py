"""/v1/responses as the official client calls it, over a scripted worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from penstock.common.errors import Overloaded, WorkerLost
from tests.conftest import RedisServer
from tests.router.fake_router import ANSWER, CONTEXT, SPANS, Router, ids_of, running, say
from tests.tiny_tokenizers import TEMPLATE, byte_level

PROMPT = "<s><|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
FINAL = ("response.completed", "response.incomplete", "response.failed")


def create(router: Router, **fields: Any) -> Any:
    return router.openai.responses.create(**{"model": "tiny", "input": "Hello?", **fields})


def prompt_of(router: Router) -> str:
    return byte_level().decode(router.last.prompt_token_ids, skip_special_tokens=False)


def eventually(read: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 60
    while not good(value := read()):
        assert time.monotonic() < deadline, value
        time.sleep(0.01)
    return value


def alike(response: Any) -> dict[str, Any]:
    """A response without what differs from one to the next."""
    fields: dict[str, Any] = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in fields["output"]:
        del item["id"]
    return fields


# ------------------------------------------------------------ creating


def test_whole_response(router: Router) -> None:
    response = create(router, metadata={"who": "me"}, instructions=None)
    assert response.id.startswith("resp_") and response.object == "response"
    assert (response.status, response.output_text, response.error) == ("completed", ANSWER, None)
    [item] = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert response.metadata == {"who": "me"} and response.text.format.type == "text"
    assert prompt_of(router) == PROMPT and router.last.sampling.max_tokens == CONTEXT - len(ids_of(PROMPT))
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(ids_of(PROMPT)), len(ids_of(ANSWER)) + 1)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == SPANS.cached_tokens


@pytest.mark.parametrize("step", [1, 1000])
def test_stream_is_the_whole_response(router: Router, step: int) -> None:
    whole = create(router)
    router.service.step = step
    events = list(create(router, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert alike(events[-1].response) == alike(whole)


def test_the_clients_own_accumulator(router: Router) -> None:
    with router.openai.responses.stream(model="tiny", input="Hello?") as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert final.output_text == ANSWER and "response.completed" in kinds


@pytest.mark.parametrize("stream", [False, True])
def test_why_it_stopped(router: Router, stream: bool) -> None:
    def ended(**fields: Any) -> Any:
        answer = create(router, stream=stream, **fields)
        return list(answer)[-1].response if stream else answer

    cut = ended(max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.output[0].status == "incomplete" and cut.max_output_tokens == 3
    stopped = ended(extra_body={"stop": "water"})
    assert (stopped.status, stopped.output_text) == ("completed", ANSWER.partition("water")[0])


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(router: Router, stream: bool) -> None:
    router.service.script = say("a😀")
    answer = create(router, stream=stream, top_logprobs=2, include=["message.output_text.logprobs"])
    events = list(answer) if stream else []
    [part] = (events[-1].response if stream else answer).output[0].content
    assert b"".join(bytes(entry.bytes) for entry in part.logprobs[:-1]).decode() == "a😀"
    assert [top.logprob for top in part.logprobs[0].top_logprobs] == [-0.25, -0.5]
    if stream:
        assert sum(len(event.logprobs) for event in events if event.type == "response.output_text.delta") == 6


def test_sampling_fields(router: Router) -> None:
    extra = {"seed": 7, "top_k": 3, "min_p": 0.1, "cache_salt": "pepper", "stop": ["x"], "priority": 2}
    response = create(router, temperature=0.5, top_p=0.9, extra_body=extra)
    sampling = router.last.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 3, 0.1)
    assert (sampling.seed, sampling.stop, router.last.cache_salt, router.last.priority) == (7, ["x"], "pepper", 2)
    assert (response.temperature, response.top_p) == (0.5, 0.9)


# ------------------------------------------------------------ keeping, going on


def test_kept_until_deleted(router: Router) -> None:
    response = create(router)
    assert router.openai.responses.retrieve(response.id).model_dump() == response.model_dump()
    router.openai.responses.delete(response.id)
    for gone in (response.id, "resp_none", create(router, store=False).id):
        with pytest.raises(openai.NotFoundError):
            router.openai.responses.retrieve(gone)
    with pytest.raises(openai.NotFoundError):
        router.openai.responses.delete(response.id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on(router: Router, stream: bool) -> None:
    first = create(router, stream=stream, instructions="Be brief.")
    first_id = list(first)[-1].response.id if stream else first.id
    turn = PROMPT.removeprefix("<s>")
    assert prompt_of(router) == "<s><|im_start|>system\nBe brief.<|im_end|>\n" + turn
    second = create(router, previous_response_id=first_id, input="And?")
    said = f"{turn}{ANSWER}<|im_end|>\n"
    and_then = "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(router) == f"<s>{said}{and_then}"  # instructions are of one turn
    assert second.previous_response_id == first_id
    create(router, previous_response_id=second.id, input="And?")
    assert prompt_of(router) == f"<s>{said}{and_then}{ANSWER}<|im_end|>\n{and_then}"
    router.openai.responses.delete(first_id)
    create(router, previous_response_id=second.id, input="And?")  # turns do not go with the response that told them
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        create(router, previous_response_id=first_id)


def test_nothing_is_kept_where_that_is_off() -> None:
    with running(response_store_mib=0) as router:
        response = create(router)
        with pytest.raises(openai.NotFoundError):
            router.openai.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError, match="--response-store-mib"):
            create(router, background=True)


# ------------------------------------------------------------ in the background


def test_background(router: Router) -> None:
    response = create(router, background=True)
    assert (response.status, response.output, response.background) == ("queued", [], True)
    done = eventually(lambda: router.openai.responses.retrieve(response.id), lambda r: r.status == "completed")
    assert done.output_text == ANSWER and done.id == response.id
    with pytest.raises(openai.BadRequestError, match="over"):
        router.openai.responses.cancel(response.id)
    with pytest.raises(openai.BadRequestError, match="stream=true"):
        router.openai.responses.retrieve(response.id, stream=True)
    create(router, previous_response_id=response.id, input="And?")
    assert f"{ANSWER}<|im_end|>" in prompt_of(router)


def test_background_is_cancelled(router: Router) -> None:
    router.service.pause_after = 5
    response = create(router, background=True)
    partly = eventually(lambda: router.openai.responses.retrieve(response.id), lambda r: r.output_text == "Hello ")
    assert partly.status == "in_progress"
    with pytest.raises(openai.BadRequestError, match="in the making"):
        create(router, previous_response_id=response.id)
    for _ in range(2):
        cancelled = router.openai.responses.cancel(response.id)
        assert (cancelled.status, cancelled.output_text) == ("cancelled", "Hello ")
    assert router.service.cancelled == [(router.last.request_id, 0)]
    assert router.openai.responses.retrieve(response.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="not completed"):
        create(router, previous_response_id=response.id)
    with pytest.raises(openai.BadRequestError, match="background=true"):
        router.service.pause_after = None
        router.openai.responses.cancel(create(router).id)
    with pytest.raises(openai.NotFoundError):
        router.openai.responses.cancel("resp_none")


def test_background_is_deleted(router: Router) -> None:
    router.service.pause_after = 5
    response = create(router, background=True)
    router.openai.responses.delete(response.id)
    assert router.service.cancel_heard.wait(60)
    with pytest.raises(openai.NotFoundError):
        router.openai.responses.retrieve(response.id)


def test_a_background_stream_can_be_left_and_read_again(router: Router) -> None:
    router.service.pause_after = 5
    with create(router, background=True, stream=True) as stream:
        seen = [next(stream) for _ in range(7)]
    assert [event.type for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    response_id = seen[0].response.id
    assert router.openai.responses.retrieve(response_id).status == "in_progress"  # nobody reads, it runs
    with router.openai.responses.retrieve(response_id, stream=True, starting_after=2) as stream:
        again = [next(stream) for _ in range(4)]
    assert again == seen[3:]
    router.openai.responses.cancel(response_id)
    router.service.pause_after = None
    events = list(create(router, background=True, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    response = events[-1].response
    assert response.status == "completed" and response.output_text == ANSWER
    kept = eventually(
        lambda: list(router.openai.responses.retrieve(response.id, stream=True, starting_after=-1)),
        lambda found: len(found) == len(events),
    )
    assert kept == events


def test_background_failures_are_told(router: Router) -> None:
    router.service.refusal = Overloaded("full")
    response = create(router, background=True)
    failed = eventually(lambda: router.openai.responses.retrieve(response.id), lambda r: r.status == "failed")
    assert (failed.error.code, failed.error.message) == ("rate_limit_exceeded", "full")


def test_the_router_stops_with_responses_in_the_making(redis_server: RedisServer) -> None:
    with running(redis_url=redis_server.url) as router:
        router.service.pause_after = 5
        response = create(router, background=True)
        eventually(lambda: router.openai.responses.retrieve(response.id), lambda r: r.status == "in_progress")
    with running(redis_url=redis_server.url) as router:  # another one knows how it ended
        assert router.openai.responses.retrieve(response.id).status == "failed"


# ------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "name": "a", "arguments": ""}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True, "store": False}, "background"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ],
    ids=str,
)
def test_mistakes_are_named(router: Router, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(router, **fields)
    assert caught.value.param == param and param.partition("[")[0] in caught.value.message


def test_a_long_input_is_named(router: Router) -> None:
    with pytest.raises(openai.BadRequestError, match=f"length is {CONTEXT} tokens") as caught:
        create(router, input="the water falls " * 300)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")


def test_other_errors(router: Router) -> None:
    with pytest.raises(openai.NotFoundError):
        create(router, model="gpt-0")
    router.service.refusal = Overloaded("full")
    with pytest.raises(openai.RateLimitError):
        create(router, stream=True)
    answer = router.http.get(f"/v1/responses/resp_{'a' * 32}", params={"stream": "true", "starting_after": "x"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "starting_after"


def test_a_failure_in_a_stream_is_an_event(router: Router) -> None:
    text = say("abc")
    router.service.script = lambda request: [*text(request)[:2], WorkerLost("gone")]
    *_, last = create(router, stream=True)
    assert last.type == "response.failed" and last.response.status == "failed"
    assert (last.response.error.code, last.response.error.message) == ("server_error", "gone")
    assert last.response.output_text == "ab" and last.response.output[0].status == "incomplete"


@pytest.mark.parametrize("step", [1, 1000])
def test_reasoning_and_a_call(redis_server: RedisServer, step: int) -> None:
    call = '<tool_call>{"name": "rain", "arguments": {"place": "Bergen"}}</tool_call>'
    parameters = {"type": "object", "properties": {"place": {"type": "string"}}}
    tools = [{"type": "function", "name": "rain", "parameters": parameters, "strict": None}]
    options: Any = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "deepseek_r1"}
    with running(redis_url=redis_server.url, **options) as router:
        router.service.script, router.service.step = say(f"Hmm.</think>Let me see.{call}"), step
        whole = create(router, tools=tools)
        with router.openai.responses.stream(model="tiny", input="Hello?", tools=tools) as stream:  # type: ignore[arg-type]
            list(stream)
            streamed = stream.get_final_response()
        for response in (whole, streamed):
            thought, message, use = response.output
            assert (thought.content[0].text, message.content[0].text) == ("Hmm.", "Let me see.")
            assert (use.name, use.arguments, response.status) == ("rain", '{"place": "Bergen"}', "completed")
        if step == 1:
            reasoned = streamed.usage.output_tokens_details.reasoning_tokens
            assert len(ids_of("Hmm.")) <= reasoned <= len(ids_of("Hmm.</think>"))
        output = {"type": "function_call_output", "call_id": whole.output[2].call_id, "output": "wet"}
        create(router, previous_response_id=whole.id, input=[output], tools=tools)
        assert "Let me see." in prompt_of(router) and "wet<|im_end|>" in prompt_of(router)


@pytest.mark.parametrize(
    ("arguments", "finish", "status"),
    [
        ('{"place": "Be', "length", "incomplete"),
        ('["Bergen"]}</tool_call>', "stop", "completed"),
        ('{"place": Bergen}}</tool_call>', "stop", "completed"),
    ],
)
def test_a_conversation_goes_on_after_a_call_with_broken_arguments(
    redis_server: RedisServer, arguments: str, finish: str, status: str
) -> None:
    """The client sees them as the model wrote them; templates, which want an object, get an empty one."""
    template = TEMPLATE.replace(
        "<|im_end|>",
        "{% for call in message.tool_calls or [] %}<{{ call.function | tojson }}>{% endfor %}<|im_end|>",
        1,
    )
    tools: Any = [{"type": "function", "name": "rain", "parameters": {"type": "object"}, "strict": None}]
    options: Any = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "redis_url": redis_server.url}
    with running(template=template, **options) as router:
        router.service.script = say('<tool_call>{"name": "rain", "arguments": ' + arguments, finish)
        first = create(router, tools=tools)
        [use] = first.output
        assert (first.status, use.name, use.arguments) == (status, "rain", arguments.removesuffix("}</tool_call>"))
        output = {"type": "function_call_output", "call_id": use.call_id, "output": "wet"}
        answered = create(router, previous_response_id=first.id, input=[output], tools=tools)
        assert '<{"name": "rain", "arguments": {}}>' in prompt_of(router) and "wet<|im_end|>" in prompt_of(router)
        for response in (first, answered):
            create(router, previous_response_id=response.id, input="And?", tools=tools)
            assert "And?<|im_end|>" in prompt_of(router)
        assert router.openai.responses.retrieve(first.id).output == first.output


# ------------------------------------------------------------ whose


def test_a_response_belongs_to_the_key_that_made_it(redis_server: RedisServer) -> None:
    with running(api_key=("secret", "other"), redis_url=redis_server.url) as router:
        other = router.openai.with_options(api_key="other").responses
        whole = create(router)
        router.service.pause_after = 3
        background = create(router, background=True)
        for response in (whole, background):
            for act in (other.retrieve, other.cancel, other.delete):
                with pytest.raises(openai.NotFoundError):
                    act(response.id)
            with pytest.raises(openai.BadRequestError, match="there is no response"):
                other.create(model="tiny", input="And?", previous_response_id=response.id)
        assert router.openai.responses.retrieve(whole.id).output_text == ANSWER
        assert router.openai.responses.cancel(background.id).status == "cancelled"
        for response in (whole, background):
            router.openai.responses.delete(response.id)
