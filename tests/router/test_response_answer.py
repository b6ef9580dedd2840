"""The events and items of a response, and reading them again, for what a scripted worker cannot say."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.router.answer_format import CallDelta, Delta, Said, Usage
from penstock.router.responses.answer import ResponseFormat
from penstock.router.responses.grown import grown, merged
from penstock.router.responses.request import Item, ResponsesRequest, chat_messages


def told(deltas: Sequence[Delta]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the events of a stream, the response in one piece) for what a choice says."""
    formats = [ResponseFormat({"id": "resp_1", "status": "", "output": []}, lambda tokens: []) for _ in range(2)]
    choice: Any = SimpleNamespace()
    said, usage = Said(), Usage(3, 9, 2, 1)
    parts = [formats[0].opening(choice)]
    for delta in deltas:
        parts.append(formats[0].delta(choice, delta, None))
        said.add(delta)
    parts.append(formats[0].closing(usage, None))
    events = [part.partition(b"data: ")[2] for part in b"".join(parts).split(b"\n\n") if part]
    whole = json.loads(formats[1].whole([choice], [said], usage, None))
    assert all(format.is_final for format in formats)
    return list(map(json.loads, events)), whole


def test_reasoning_text_and_calls_are_items() -> None:
    deltas = [
        Delta(reasoning="Hm"),
        Delta(reasoning="m.", content="Let "),
        Delta(content="me see."),
        Delta(calls=[CallDelta(0, call_id="c0", name="rain"), CallDelta(0, '{"place":')]),
        Delta(calls=[CallDelta(0, '"Bergen"}'), CallDelta(1, "{}", "c1", "wind")]),
        Delta(finish_reason="tool_calls"),
    ]
    events, whole = told(deltas)
    added = [event["item"]["type"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert added == [item["type"] for item in done] == ["reasoning", "message", "function_call", "function_call"]
    final = events[-1]["response"]
    assert final["output"] == done and final["status"] == "completed"
    assert done[0]["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert done[1]["content"][0]["text"] == "Let me see."
    assert (done[2]["call_id"], done[2]["name"], done[2]["arguments"]) == ("c0", "rain", '{"place":"Bergen"}')
    arguments = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(arguments) == '{"place":"Bergen"}{}'
    for response in (final, whole):
        for item in response["output"]:
            del item["id"]
        del response["completed_at"]
    assert final == whole and whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 1}


_deltas = st.lists(
    st.builds(
        Delta,
        content=st.sampled_from(["", "", "a\n\nb", "ö"]),
        reasoning=st.sampled_from(["", "", "hm\n\n"]),
        tokens=st.sampled_from([[], [1], [1, 2]]),
    )
    | st.integers(0, 2).map(lambda call: Delta(calls=[CallDelta(call, '{"a":', f"c{call}", "rain")])),
    max_size=12,
)


@settings(max_examples=60)
@given(deltas=_deltas, every=st.integers(1, 3))
def test_events_tell_all_of_a_response_at_any_time(deltas: list[Delta], every: int) -> None:
    scores = lambda tokens: [{"token": str(token)} for token in tokens]  # noqa: E731
    format = ResponseFormat({"id": "resp_1", "status": "queued", "output": []}, scores)
    choice: Any = SimpleNamespace()
    log = format.queued()
    steps = [lambda: format.opening(choice), *(lambda d=d: format.delta(choice, d, None) for d in deltas)]
    told, few = 0, b""
    for at, step in enumerate((*steps, lambda: format.closing(Usage(3, 9, 2, 1), None))):
        response = msgspec.json.encode(format.response)
        assert msgspec.json.encode(grown(log)) == response
        if at % every == 0:
            few, told = few + merged(log[told:]), len(log)
            assert msgspec.json.encode(grown(few)) == response and few.count(b"\n\n") <= log.count(b"\n\n")
        log += step()
    assert grown(log) == format.response and format.is_final
    kinds = [event["type"] for event in map(json.loads, re.findall(b"data: (.*)", merged(log)))]
    assert all(a != b or not a.endswith(".delta") for a, b in itertools.pairwise(kinds))


def test_items_become_chat_messages() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Ask."}]},
        {"type": "function_call", "call_id": "c0", "name": "rain", "arguments": "{}"},
        {"type": "function_call", "call_id": "c1", "name": "wind", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c0", "output": "wet"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "calm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wet."}]},
        {"role": "assistant", "content": "Calm."},
    ]

    def call(name: str, call_id: str) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}

    assert chat_messages(msgspec.convert(items, list[Item])) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "Ask.",
            "tool_calls": [call("rain", "c0"), call("wind", "c1")],
        },
        {"role": "tool", "tool_call_id": "c0", "content": "wet"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "calm"}]},
        {"role": "assistant", "content": "Wet."},
        {"role": "assistant", "content": "Calm."},
    ]


def test_tools_of_other_kinds_are_refused() -> None:
    request = msgspec.convert({"input": "a", "tools": [{"type": "web_search"}]}, ResponsesRequest)
    with pytest.raises(Exception, match="web_search"):
        request.check()
