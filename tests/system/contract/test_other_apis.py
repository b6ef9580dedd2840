"""The Responses and the Messages API on real fleets, by their own clients: what they say is what a chat says."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.system.openai_servers import CONTEXT, KEY, MESSAGES, MODES, Server

pytestmark = pytest.mark.system

SYSTEM, USER = MESSAGES[0]["content"], MESSAGES[1]["content"]
EXTRA: dict[str, Any] = {"ignore_eos": True, "temperature": 0.0}


@pytest.fixture(scope="module")
def clients(servers: dict[str, Server]) -> Iterator[dict[str, anthropic.Anthropic]]:
    found = {
        mode: anthropic.Anthropic(base_url=server.fleet.url, api_key=KEY, max_retries=0, timeout=60)
        for mode, server in servers.items()
    }
    yield found
    for client in found.values():
        client.close()


def response(server: Server, **fields: Any) -> Any:
    values = {"model": "tiny", "input": USER, "instructions": SYSTEM, "max_output_tokens": 12, "extra_body": EXTRA}
    return server.client.responses.create(**values | fields)


def message(client: anthropic.Anthropic, **fields: Any) -> Any:
    user = {"role": "user", "content": USER}
    values = {"model": "tiny", "system": SYSTEM, "messages": [user], "max_tokens": 12, "extra_body": EXTRA}
    return client.messages.create(**values | fields)


# ------------------------------------------------------------ responses


def test_a_response_says_what_a_chat_says(server: Server) -> None:
    [chat] = server.ask(chat=True, temperature=0, max_tokens=12)
    whole = response(server)
    events = list(response(server, stream=True))
    with server.client.responses.stream(
        model="tiny", input=USER, instructions=SYSTEM, max_output_tokens=12, extra_body=EXTRA
    ) as stream:
        kinds = [event.type for event in stream]
    assert whole.output_text == events[-1].response.output_text == chat.text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == chat.text
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"
    assert whole.status == "incomplete" and whole.usage.output_tokens == 12
    assert events[-1].response.usage.output_tokens == 12
    assert events[-1].response.usage.input_tokens == whole.usage.input_tokens


def test_a_response_is_kept_gone_on_from_and_deleted(server: Server) -> None:
    first = response(server, input="水力?", instructions=None)
    assert server.client.responses.retrieve(first.id).model_dump() == first.model_dump()
    second = response(server, input="Why?", instructions=None, previous_response_id=first.id)
    turns = [("user", "水力?"), ("assistant", first.output_text), ("user", "Why?")]
    told = [{"role": role, "content": content} for role, content in turns]
    assert second.output_text == response(server, input=told, instructions=None).output_text
    server.client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        response(server, previous_response_id=first.id)


def test_a_response_in_the_background(server: Server) -> None:
    made = response(server, background=True)
    deadline = time.monotonic() + 60
    while made.status in ("queued", "in_progress") and time.monotonic() < deadline:
        made = server.client.responses.retrieve(made.id)
    assert made.status == "incomplete" and made.output_text == response(server).output_text
    endless = response(server, background=True, stream=True, max_output_tokens=CONTEXT - 60)
    first = next(iter(endless))
    endless.close()
    ended = server.client.responses.cancel(first.response.id)
    assert ended.status in ("cancelled", "incomplete")  # it may have been quicker
    assert server.client.responses.retrieve(ended.id).status == ended.status


def test_logprobs_of_responses(server: Server) -> None:
    [chat] = server.ask(chat=True, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2)
    found = response(server, top_logprobs=2, include=["message.output_text.logprobs"])
    scores = found.output[0].content[0].logprobs
    assert [entry.logprob for entry in scores] == pytest.approx([logprob for logprob, _ in chat.logprobs], abs=1e-4)
    assert all(len(entry.top_logprobs) == 2 for entry in scores)


def test_async_responses(server: Server) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=server.client.base_url, api_key=KEY, max_retries=0) as client:
            fields: dict[str, Any] = {"model": "tiny", "input": USER, "max_output_tokens": 8, "extra_body": EXTRA}
            whole = await client.responses.create(**fields)
            parts = [event async for event in await client.responses.create(**fields, stream=True)]
        return whole.output_text, parts[-1].response.output_text

    whole, streamed = asyncio.run(ask())
    assert whole == streamed != ""


def test_responses_errors_are_typed(server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        response(server, model="gpt-0")
    with pytest.raises(openai.BadRequestError) as caught:
        response(server, max_output_tokens=0)
    assert caught.value.param == "max_output_tokens"
    with pytest.raises(openai.BadRequestError) as caught:
        response(server, input="water " * 400, stream=True)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError):
        server.client.responses.cancel("resp_none")


# ------------------------------------------------------------ messages


@pytest.mark.parametrize("mode", MODES)
def test_a_message_says_what_a_chat_says(
    servers: dict[str, Server], clients: dict[str, anthropic.Anthropic], mode: str
) -> None:
    [chat] = servers[mode].ask(chat=True, temperature=0, max_tokens=12)
    client = clients[mode]
    whole = message(client)
    user: Any = {"role": "user", "content": USER}
    with client.messages.stream(
        model="tiny", system=SYSTEM, messages=[user], max_tokens=12, extra_body=EXTRA
    ) as stream:
        text = "".join(stream.text_stream)
        final: Any = stream.get_final_message()
    assert whole.content[0].text == final.content[0].text == text == chat.text
    assert whole.stop_reason == final.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == final.usage.output_tokens == 12
    counted = client.messages.count_tokens(model="tiny", system=SYSTEM, messages=[user]).input_tokens
    for usage in (whole.usage, final.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
    stop = chat.text[3:6]
    stopped = message(client, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == chat.text.partition(stop)[0]
    assert message(client, extra_body=EXTRA | {"temperature": 4.0, "seed": 5}).content[0].text == (
        servers[mode].ask(chat=True, temperature=4.0, seed=5, max_tokens=12)[0].text
    )


@pytest.mark.parametrize("mode", MODES)
def test_async_messages(clients: dict[str, anthropic.Anthropic], mode: str) -> None:
    async def ask() -> tuple[str, str]:
        fields: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": USER}]}
        base_url = clients[mode].base_url
        async with anthropic.AsyncAnthropic(base_url=base_url, api_key=KEY, max_retries=0) as client:
            whole: Any = await client.messages.create(**fields, extra_body=EXTRA)
            async with client.messages.stream(**fields, extra_body=EXTRA) as stream:
                streamed: Any = await stream.get_final_message()
        return whole.content[0].text, streamed.content[0].text

    whole, streamed = asyncio.run(ask())
    assert whole == streamed != ""


@pytest.mark.parametrize("mode", MODES)
def test_messages_errors_are_typed(clients: dict[str, anthropic.Anthropic], mode: str) -> None:
    with pytest.raises(anthropic.NotFoundError):
        message(clients[mode], model="claude-0")
    with pytest.raises(anthropic.BadRequestError, match="max_tokens") as caught:
        message(clients[mode], max_tokens=0)
    assert json.loads(caught.value.response.text)["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        message(clients[mode], system="water " * 400, stream=True)


def test_messages_need_the_key(servers: dict[str, Server]) -> None:
    wrong = anthropic.Anthropic(base_url=servers["pair"].fleet.url, api_key="sk-wrong", max_retries=0)
    with wrong as client, pytest.raises(anthropic.AuthenticationError):
        message(client)
