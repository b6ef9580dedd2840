"""Tools and reasoning over real fleets, one-phase and 1 + 1, with a model that says what is written here."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from penstock.fleet import Fleet
from tests.speaking_model import make_speaker
from tests.system.fleets import fleet, ledgers, router_metric, wait_restarted

pytestmark = pytest.mark.system

# Where a form leaves no choice it takes the tokens that its text usually has: in the scripts of demanded calls these
# happen to be the script's own, with these names in this order.
SCRIPTS: dict[str, Sequence[str]] = {
    "<must>": [
        "<think>\n[{Braces}] are no call yet.\n</think>",
        '[{"name": "sky", "parameters": {"Place": "Oslo \\"S\\"", "Days": [7]}}, ',
        '{"name": "sea", "parameters": {}}]',
    ],
    "<calls>": [
        "<think>\nTwo cities.\n</think>\n\nLet me see.\n",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}\n</tool_call>\n',
        '<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>',
    ],
    "<talk>": ["<think>Nothing to look up.</think>", "It is a pipe that carries water."],
    "<named>": ["<think>Only where to?</think>", '{"city": "Bergen", "days": [5]}'],
    "<long>": [
        f"<think>{''.join(map(str, range(200, 800)))}</think>",
        '[{"name": "weather", "parameters": {"city": "Bod"}}]',
    ],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}}}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "one-phase": {},
    "pair": {"prefill_workers": 1, "decode_workers": 2, "routing_policy": "round-robin"},  # one of them will die
}
PARSERS = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"}


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Fleet]]:
    model = make_speaker(tmp_path_factory.mktemp("speaker"), SCRIPTS)
    with contextlib.ExitStack() as stack:
        yield {mode: stack.enter_context(fleet(model, **PARSERS, **options)) for mode, options in MODES.items()}


@pytest.fixture(params=MODES)
def client(fleets: dict[str, Fleet], request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    with client_of(fleets[request.param]) as client:
        yield client


def client_of(running: Fleet) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)


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


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_are_demanded_come_after_the_reasoning(client: openai.OpenAI, stream: bool) -> None:
    """A form that held from the first token on would forbid the reasoning; one that never began, nothing else."""
    parameters = {"type": "object", "properties": {"Place": {"type": "string"}, "Days": {"type": "array"}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("sky", "sea")]
    [choice] = ask(client, "<must>", stream=stream, tool_choice="required", tools=tools)
    message = choice.message
    assert message.reasoning == "\n[{Braces}] are no call yet.\n" and not message.content
    assert calls_of(message) == [("sky", {"Place": 'Oslo "S"', "Days": [7]}), ("sea", {})]
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_call_comes_after_the_reasoning(client: openai.OpenAI, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    [choice] = ask(client, "<named>", stream=stream, tool_choice=named)
    assert choice.message.reasoning == "Only where to?" and not choice.message.content
    assert calls_of(choice.message) == [("weather", {"city": "Bergen", "days": [5]})]
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_no_call_is_read_where_none_is_wanted(client: openai.OpenAI, stream: bool) -> None:
    [choice] = ask(client, "<calls>", stream=stream, tool_choice="none")
    assert not choice.message.tool_calls and choice.finish_reason == "stop"
    assert choice.message.reasoning == "\nTwo cities.\n"
    assert choice.message.content == "".join(SCRIPTS["<calls>"]).partition("</think>")[2]


def test_a_round_with_the_tools_answer(client: openai.OpenAI) -> None:
    """What an answer said goes back into the conversation as it is."""
    [choice] = ask(client, "<calls>", stream=False)
    said = choice.message.model_dump(exclude_none=True)
    answers = [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in said["tool_calls"]]
    messages = [*conversation("<calls>"), said, *answers, {"role": "user", "content": "<talk>"}]
    [choice] = ask(client, "", stream=False, messages=messages)
    assert choice.message.content == "It is a pipe that carries water."


def test_a_call_that_is_demanded_survives_its_decode_worker(fleets: dict[str, Fleet]) -> None:
    """Killed while the model reasons: another worker finds out from the text so far that the form has not begun."""
    running = fleets["pair"]
    moved = router_metric(running.url, "penstock:retries_total")
    fields: dict[str, Any] = {"model": "tiny", "messages": conversation("<long>"), "tools": TOOLS, "temperature": 0}
    while router_metric(running.url, "penstock:retries_total") == moved:  # it may be over before its worker dies
        with client_of(running) as client, client.chat.completions.stream(tool_choice="required", **fields) as stream:
            next(event for event in stream if event.type == "chunk" and event.chunk.choices[0].delta.model_extra)
            busy = [worker for worker, ledger in ledgers(running).items() if worker[0] == "d" and ledger["requests"]]
            pids = running.group.pids()
            for worker in busy:
                running.kill(worker, signal.SIGKILL)
            [choice] = stream.get_final_completion().choices
        assert choice.message.reasoning == SCRIPTS["<long>"][0][len("<think>") : -len("</think>")]
        assert calls_of(choice.message) == [("weather", {"city": "Bod"})]
        for worker in busy:
            wait_restarted(running, worker, pids[worker])
