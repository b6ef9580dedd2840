"""Tools and reasoning over real fleets, one-phase and 1 + 1, with a model that says what is written here."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from tests.speaking_model import make_speaker
from tests.system.fleets import fleet

pytestmark = pytest.mark.system

SCRIPTS: dict[str, Sequence[str]] = {
    "<calls>": [
        "<think>\nTwo cities.\n</think>\n\nLet me see.\n",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}\n</tool_call>\n',
        '<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>',
    ],
    "<talk>": ["<think>Nothing to look up.</think>", "It is a pipe that carries water."],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
MODES: dict[str, dict[str, Any]] = {"one-phase": {}, "pair": {"prefill_workers": 1}}
PARSERS = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"}


@pytest.fixture(scope="module")
def _clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, openai.OpenAI]]:
    model = make_speaker(tmp_path_factory.mktemp("speaker"), SCRIPTS)
    with contextlib.ExitStack() as stack:
        clients = {}
        for mode, options in MODES.items():
            running = stack.enter_context(fleet(model, **PARSERS, **options))
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)
            clients[mode] = stack.enter_context(client)
        yield clients


@pytest.fixture(params=MODES)
def client(_clients: dict[str, openai.OpenAI], request: pytest.FixtureRequest) -> openai.OpenAI:
    return _clients[request.param]


def conversation(script: str) -> list[Any]:
    return [{"role": "system", "content": "A few words before."}, {"role": "user", "content": script}]


def ask(client: openai.OpenAI, script: str, *, stream: bool, **fields: Any) -> list[Any]:
    """The choices of an answer; a stream's as the client's own accumulator makes them."""
    fields = {"model": "tiny", "messages": conversation(script), "temperature": 0, "tools": TOOLS, **fields}
    if not stream:
        return list(client.chat.completions.create(**fields).choices)
    with client.chat.completions.stream(**fields) as running:
        return list(running.get_final_completion().choices)


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


@pytest.mark.parametrize("stream", [False, True])
def test_calls(client: openai.OpenAI, stream: bool) -> None:
    choices = ask(client, "<calls>", stream=stream, n=2)
    assert len(choices) == 2
    for choice in choices:
        assert calls_of(choice.message) == [("weather", {"city": "Oslo", "days": [1, 2]}), ("now", {})]
        assert choice.message.content == "\n\nLet me see.\n" and choice.finish_reason == "tool_calls"
        assert choice.message.reasoning == choice.message.reasoning_content == "\nTwo cities.\n"


@pytest.mark.parametrize("stream", [False, True])
def test_no_calls(client: openai.OpenAI, stream: bool) -> None:
    [choice] = ask(client, "<talk>", stream=stream)
    message = choice.message
    assert (message.reasoning, message.content) == ("Nothing to look up.", "It is a pipe that carries water.")
    assert not message.tool_calls and choice.finish_reason == "stop"


def test_a_model_that_does_not_want_to_is_made_to(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"],
                  "additionalProperties": False}  # fmt: skip
    tools = [{"type": "function", "function": {"name": "convert", "parameters": parameters}}]
    fields = {"tool_choice": "required", "tools": tools, "parallel_tool_calls": False}
    [choice] = ask(client, "<talk>", stream=False, **fields, max_tokens=400)
    assert calls_of(choice.message), (choice.finish_reason, choice.message)
    [(name, arguments)] = calls_of(choice.message)
    assert name == "convert" and arguments["unit"] in ("C", "F")
    assert choice.message.reasoning == "Nothing to look up.", "it reasons as it likes"


def test_a_round_with_the_tools_answer(client: openai.OpenAI) -> None:
    """What an answer said goes back into the conversation as it is."""
    [choice] = ask(client, "<calls>", stream=False)
    said = choice.message.model_dump(exclude_none=True)
    answers = [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in said["tool_calls"]]
    messages = [*conversation("<calls>"), said, *answers, {"role": "user", "content": "<talk>"}]
    [choice] = ask(client, "", stream=False, messages=messages)
    assert choice.message.content == "It is a pipe that carries water."
