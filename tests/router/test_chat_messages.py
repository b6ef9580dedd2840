"""Messages in the forms that templates take, and how it is found out which those are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.common.errors import BadRequest
from penstock.router.anthropic.request import MessagesRequest
from penstock.router.chat_messages import MAX_MESSAGES, ContentForms, check_messages, template_messages
from penstock.router.responses.request import ResponsesRequest
from penstock.router.tools.request import MAX_TOOLS
from tests.router.fake_router import running
from tests.tiny_tokenizers import byte_level

PARTS = "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}{% endfor %}"
)
STRINGS = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
TEXT: list[dict[str, Any]] = [{"role": "user", "content": "one"}]
LIST: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
]


@pytest.mark.parametrize(
    ("template", "option", "text", "listed"),
    [
        (PARTS, "auto", "(one)", "(a)(b)"),
        (EITHER, "auto", "one", "(a)(b)"),
        (STRINGS, "auto", "one", "a\nb"),
        (EITHER, "string", "one", "a\nb"),
        (EITHER, "openai", "(one)", "(a)(b)"),
    ],
    ids=["parts", "either", "strings", "told-string", "told-openai"],
)
def test_forms_of_content(template: str, option: str, text: str, listed: str) -> None:
    with running(template=template, chat_template_content_format=option) as router:
        for messages, expected in ((TEXT, text), (LIST, listed)):
            assert router.post("/v1/chat/completions", {"messages": messages}).status_code == 200
            assert byte_level().decode(router.last.prompt_token_ids) == expected


def test_messages_are_not_changed_in_place() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    message = {"role": "assistant", "tool_calls": [call], "x": 1}
    [made] = template_messages([message], ContentForms())
    assert made["tool_calls"][0] == {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": [1]}}}
    assert made["content"] is None and made["x"] == 1
    assert message == {"role": "assistant", "tool_calls": [call], "x": 1} and call["function"]["arguments"][0] == "{"


def test_empty_calls_are_none() -> None:
    [made] = template_messages([{"role": "assistant", "content": "a", "tool_calls": []}], ContentForms())
    assert made == {"role": "assistant", "content": "a"}


def test_messages_their_parts_and_calls_are_counted() -> None:
    part, call = {"type": "text", "text": ""}, {"function": {"name": "f"}}
    check_messages([{"role": "user", "content": [part] * (MAX_MESSAGES - 1)}])
    for many in (
        [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1),
        [{"role": "user", "content": [part] * MAX_MESSAGES}],
        [{"role": "assistant", "tool_calls": [call] * MAX_MESSAGES}],
    ):
        with pytest.raises(BadRequest, match="at most"):
            check_messages(many)


def test_too_many_tools_are_refused_before_they_are_translated() -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "input": "a", "max_tokens": 1}
    for kind, tool in (
        (MessagesRequest, {"name": "f", "input_schema": {}}),
        (ResponsesRequest, {"type": "function", "name": "f"}),
    ):
        request: Any = msgspec.convert({**body, "tools": [tool] * MAX_TOOLS}, kind)
        request.check()
        request.tools *= 2
        with pytest.raises(BadRequest, match=f"tools must be at most {MAX_TOOLS}"):
            request.check()
