"""Tools and reasoning in chats as users of the openai client see them, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import ConfigError
from tests.router.fake_router import Router, ids_of, running, say
from tests.tiny_tokenizers import byte_level

USER = {"role": "user", "content": "Weather?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Pá\\"ris"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
TWO = f"<think>\nHm.\n</think>\n\nI look.\n{CALL}\n{NOW}"
TEMPLATE = (
    "{% if tools %}tools:{{ tools | tojson }}\n{% endif %}{% if documents %}{{ documents | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.id }} {{ c.function.name }}({{ c.function.arguments.items() | list }})"
    "{% endfor %}{{ m.tool_call_id }}{{ m.reasoning_content }};{% endfor %}"
    "{% if enable_thinking is defined %}thinking={{ enable_thinking }}{% endif %}{{ reasoning_effort }}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def _shared() -> Iterator[Router]:
    options = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    with running(template=TEMPLATE, default_chat_template_kwargs='{"mood": "calm"}', **options) as router:
        yield router


@pytest.fixture
def tools(_shared: Router) -> Router:
    _shared.reset()
    _shared.service.script = say(TWO)
    return _shared


def create(router: Router, **fields: Any) -> Any:
    return router.openai.chat.completions.create(**{"model": "tiny", "messages": [USER], "tools": TOOLS, **fields})


def prompt_of(router: Router) -> str:
    return byte_level().decode(router.last.prompt_token_ids, skip_special_tokens=False)


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


MADE = [("weather", {"city": 'Pá"ris'}), ("now", {})]


def test_whole_answer(tools: Router) -> None:
    [choice] = create(tools).choices
    message = choice.message
    assert choice.finish_reason == "tool_calls" and calls_of(message) == MADE
    assert message.content == "\n\nI look.\n" and message.reasoning == message.reasoning_content == "\nHm.\n"
    assert {call.type for call in message.tool_calls} == {"function"}
    assert len({call.id for call in message.tool_calls}) == 2 and message.tool_calls[0].id.startswith("call_")
    tools.service.script = say(f"</think>\n{CALL}\n")
    message = create(tools).choices[0].message
    assert message.content is None and calls_of(message) == MADE[:1], "white space beside calls is no content"


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("n", [1, 2])
def test_streamed_deltas(tools: Router, step: int, n: int) -> None:
    tools.service.step = step
    content, reasoning, reasons = [""] * n, [""] * n, [None] * n
    calls: list[list[dict[str, str]]] = [[] for _ in range(n)]
    for chunk in create(tools, stream=True, n=n):
        for choice in chunk.choices:
            at, delta = choice.index, choice.delta
            content[at] += delta.content or ""
            assert getattr(delta, "reasoning", None) == getattr(delta, "reasoning_content", None)
            reasoning[at] += getattr(delta, "reasoning", None) or ""
            for piece in delta.tool_calls or ():
                if piece.index == len(calls[at]):
                    assert piece.id and piece.type == "function" and piece.function.name
                    calls[at].append({"id": piece.id, "name": piece.function.name, "arguments": ""})
                else:
                    assert piece.id is None and piece.function.name is None
                calls[at][piece.index]["arguments"] += piece.function.arguments
            reasons[at] = choice.finish_reason
    assert content == ["\n\nI look.\n"] * n and reasoning == ["\nHm.\n"] * n and reasons == ["tool_calls"] * n
    for made in calls:
        assert [(call["name"], json.loads(call["arguments"])) for call in made] == MADE
    assert len({call["id"] for made in calls for call in made}) == 2 * n


def test_the_clients_own_accumulator(tools: Router) -> None:
    with tools.openai.chat.completions.stream(model="tiny", messages=[USER], tools=TOOLS) as stream:
        events = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert calls_of(message) == MADE and message.content == "\n\nI look.\n"
    assert events.count("tool_calls.function.arguments.done") == 2
    assert events.count("tool_calls.function.arguments.delta") > 4, "arguments come in pieces"


def test_what_goes_with_parsers(tools: Router) -> None:
    """Logprobs cover every token, usage every one that was computed, token ids are all there."""
    text = "</think>" + CALL
    tools.service.script = say(text)
    fields = {"logprobs": True, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(create(tools, **fields, extra_body={"return_token_ids": True}))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    scored = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert b"".join(bytes(entry.bytes) for entry in scored[:-1]).decode() == text
    assert [i for choice in choices for i in getattr(choice, "token_ids", None) or ()] == [*ids_of(text), 2]
    assert chunks[-1].usage.completion_tokens == len(ids_of(text)) + 1
    assert choices[-1].finish_reason == "tool_calls"


def test_stop_string_and_length(tools: Router) -> None:
    [choice] = create(tools, stop=["look"]).choices
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("\n\nI ", "stop", None)
    [choice] = create(tools, max_tokens=len(ids_of(TWO[: TWO.index("Pá")]))).choices
    assert choice.finish_reason == "length" and choice.message.tool_calls[0].function.arguments.startswith('{"city"')
    [choice] = create(tools, max_tokens=len(ids_of("<think>\nH"))).choices
    assert (choice.message.content, choice.message.reasoning, choice.finish_reason) == (None, "\nH", "length")


def test_one_call_at_a_time(tools: Router) -> None:
    assert calls_of(create(tools, parallel_tool_calls=False).choices[0].message) == MADE[:1]
    with tools.openai.chat.completions.stream(
        model="tiny", messages=[USER], tools=TOOLS, parallel_tool_calls=False
    ) as stream:
        assert calls_of(stream.get_final_completion().choices[0].message) == MADE[:1]


def test_reasoning_that_nobody_wants(tools: Router) -> None:
    message = create(tools, extra_body={"include_reasoning": False}).choices[0].message
    assert message.reasoning is None and message.content == "\n\nI look.\n"
    tools.service.script = say("It is.")
    for body in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        message = create(tools, extra_body=body).choices[0].message
        assert (message.reasoning, message.content) == (None, "It is.")
    assert prompt_of(tools).endswith("assistant:<think>\n\n</think>\n\n")


def test_no_tools_no_parsing(tools: Router) -> None:
    tools.service.script = say("</think>" + CALL)
    for fields in ({"tool_choice": "none"}, {"tools": []}):
        message = create(tools, **fields).choices[0].message
        assert message.content == CALL and message.tool_calls is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["required", "named"])
def test_calls_that_are_demanded(router: Router, mode: str, stream: bool) -> None:
    """They need no parser: the output is constrained to JSON."""
    arguments = '{"city": "Oslo"}'
    listed = f'[{{"name": "weather", "parameters": {arguments}}}, {{"name": "now", "parameters": {{}}}}]'
    choice: Any = "required" if mode == "required" else {"type": "function", "function": {"name": "weather"}}
    router.service.script = say(listed if mode == "required" else arguments)
    fields = {"model": "tiny", "messages": [USER], "tools": TOOLS, "tool_choice": choice}
    if stream:
        with router.openai.chat.completions.stream(**fields) as running_stream:
            [made] = running_stream.get_final_completion().choices
    else:
        [made] = router.openai.chat.completions.create(**fields).choices
    expected = [("weather", {"city": "Oslo"}), ("now", {})]
    assert calls_of(made.message) == (expected if mode == "required" else expected[:1])
    assert not made.message.content and made.finish_reason == ("tool_calls" if mode == "required" else "stop")
    constraint = router.last.sampling.structured_outputs
    assert constraint is not None and isinstance(constraint.json, str)
    schema = json.loads(constraint.json)
    if mode == "named":
        assert schema == SCHEMA
    else:
        assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == ["weather", "now"]
        assert schema["$defs"]["tool0"] == SCHEMA and schema["minItems"] == 1


def test_a_demanded_call_after_reasoning(tools: Router) -> None:
    tools.service.script = say('so</think>[{"name": "now", "parameters": {}}]')
    [choice] = create(tools, tool_choice="required").choices
    assert (choice.message.reasoning, calls_of(choice.message)) == ("so", [("now", {})])
    constraint = tools.last.sampling.structured_outputs
    assert constraint is not None and '"</think>"' in str(constraint.structural_tag)
    tools.service.script = say('[{"name": "now", "parameters": {}}]')
    [choice] = create(tools, tool_choice="required", extra_body={"reasoning_effort": "none"}).choices
    assert (choice.message.reasoning, calls_of(choice.message)) == (None, [("now", {})])
    constraint = tools.last.sampling.structured_outputs
    assert constraint is not None and constraint.json is not None


def test_what_the_template_gets(tools: Router) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
            {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}},
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    ]  # fmt: skip
    create(tools, messages=messages, extra_body={"documents": [{"title": "t"}], "reasoning_effort": "low"})
    assert prompt_of(tools) == (
        f"tools:{json.dumps(TOOLS)}\n" '[{"title": "t"}]user:Weather?;'
        "assistant:call_1 weather([('city', 'Oslo')])call_2 now([])hm;tool:raincall_1;"
        "thinking=Truelowassistant:"
    )  # fmt: skip


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": ["x"]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ({"documents": "x"}, "documents"),
    ({"messages": [{"role": "assistant", "tool_calls": {"id": "x"}}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0]"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "assistant", "content": "", "reasoning": 5}]}, "messages[0].reasoning_content"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=str)
def test_wrong_fields_are_named(tools: Router, fields: dict[str, Any], param: str) -> None:
    response = tools.post("/v1/chat/completions", {"messages": [USER], **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and param.partition("[")[0] in error["message"]
    assert tools.service.requests == []


def test_auto_needs_the_options(router: Router) -> None:
    for fields in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "auto"}):
        error = router.post("/v1/chat/completions", {"messages": [USER], **fields}).json()["error"]
        assert error["param"] == "tool_choice" and "--enable-auto-tool-choice" in error["message"]
    router.service.script = say("plain")
    assert create(router, tool_choice="none").choices[0].message.content == "plain"


def test_the_documents_plugin(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/tools.md").read_text()
    path = tmp_path / "brackets.py"
    path.write_text(text.split("```python\n")[1].split("```")[0])
    options = {"tool_parser_plugin": str(path), "tool_call_parser": "brackets", "enable_auto_tool_choice": True}
    with running(**options) as router:
        router.service.script = say('Yes. <<weather {"city": "x"}>><<now {}>>')
        message = create(router).choices[0].message
        assert message.content == "Yes. " and calls_of(message) == [("weather", {"city": "x"}), ("now", {})]


PLUGIN = """
from penstock.router.incremental import Arguments, CallBegins, CallEnds, Content
from penstock.router.reasoning.parser import Marked
from penstock.router.tools.parser import ToolParser


class Marks(ToolParser):
    names = ("marks",)
    markers = ("<|im_start|>",)

    def parse(self, text):
        while (yield from text.until(self.markers)):
            yield CallBegins((yield from text.word()))
            yield from text.json(Arguments)
            yield CallEnds()


class Hash(Marked):
    names = ("hash",)
    starts, ends = ("#",), (";",)
"""


def test_plugins_and_special_tokens(tmp_path: Path) -> None:
    """A marker that is a special token is seen by its parser and by nobody else."""
    path = tmp_path / "marks.py"
    path.write_text(PLUGIN)
    options = {"tool_parser_plugin": str(path), "tool_call_parser": "marks", "enable_auto_tool_choice": True}
    with running(**options, reasoning_parser="hash", reasoning_parser_plugin=str(path)) as router:
        router.service.script = say('#so;Yes.<|im_start|>weather{"city": "x"}')
        message = create(router).choices[0].message
        assert (message.reasoning, message.content) == ("so", "Yes.")
        assert calls_of(message) == [("weather", {"city": "x"})]
        router.service.script = say("a<s>b")
        assert create(router).choices[0].message.content == "ab", "other special tokens stay hidden"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"enable_auto_tool_choice": True}, "tool_call_parser"),
        ({"enable_auto_tool_choice": True, "tool_call_parser": "klingon"}, "--tool-call-parser.*hermes, llama3_json"),
        ({"reasoning_parser": "klingon"}, "--reasoning-parser.*deepseek_r1"),
        ({"tool_parser_plugin": "/nowhere.py", "tool_call_parser": "x"}, "--tool-parser-plugin: /nowhere.py"),
        ({"reasoning_parser_plugin": "/nowhere.txt"}, "--reasoning-parser-plugin: /nowhere.txt is no Python file"),
        ({"default_chat_template_kwargs": "[]"}, "--default-chat-template-kwargs must be a JSON object"),
        ({"chat_template_content_format": "maybe"}, "chat_template_content_format"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint), running(**options):
        pass


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_schema_that_is_nested_too_deep_is_the_clients_fault(tools: Router, choice: str) -> None:
    depth = 900
    schema = '{"properties":' * depth + "{}" + "}" * depth
    body = (
        '{"messages":[{"role":"user","content":"?"}],"max_tokens":9,"tool_choice":"%s","tools":'
        '[{"type":"function","function":{"name":"f","parameters":%s}}]}'
    )
    response = tools.http.post("/v1/chat/completions", content=body % (choice, schema))
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error", response.text
