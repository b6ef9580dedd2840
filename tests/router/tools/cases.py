"""Answers of every tool format, and what they say: (content, [(name, arguments)])."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from penstock.router.answer_format import Said
from penstock.router.answer_parser import AnswerParsing
from penstock.router.tools import formats, pythonic, qwen3_coder
from penstock.router.tools.parser import ToolParser

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": ["boolean", "null"]},
            "near": {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/Place"}]},
            "unit": {"enum": ["C", "F"]},
            "any": {},
        },
        "$defs": {"Place": {"type": "object"}},
    },
    "now": {"type": "object", "properties": {}},
}
PARSERS: tuple[type[ToolParser], ...] = (
    formats.Hermes, formats.Llama3Json, formats.Mistral, formats.DeepSeekV3, formats.Granite,
    qwen3_coder.Qwen3Coder, pythonic.Pythonic,
)  # fmt: skip
PARIS = '{"city": "Paris", "days": 3}'
TRICKY = '{"city": "a \\"quoted\\" } ] </tool_call> é😀\\\\", "near": {"x": [1, [2]], "y": {}}}'
Calls = list[tuple[str, Any]]


class Case(NamedTuple):
    """An answer in a parser's format; arguments are compared as JSON, or as text if they are none."""

    parser: type[ToolParser]
    text: str
    content: str
    calls: Calls


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def deepseek(*calls: tuple[str, str]) -> str:
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def coder(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


P, T = json.loads(PARIS), json.loads(TRICKY)
WELL_FORMED = [
    Case(formats.Hermes, hermes(call("weather", PARIS)), "", [("weather", P)]),
    Case(formats.Hermes, "One moment.\n" + hermes(call("weather", TRICKY), call("now", "{}")), "One moment.\n",
         [("weather", T), ("now", {})]),
    Case(formats.Hermes, hermes('{"arguments": {"city": "x"}, "name": "weather", "id": "7"}'), "",
         [("weather", {"city": "x"})]),
    Case(formats.Hermes, hermes('{"name": "now"}') + "\nDone.", "\nDone.", [("now", {})]),
    Case(formats.Hermes, hermes(call("weather", json.dumps(PARIS))), "", [("weather", P)]),
    Case(formats.Hermes, '<tool_call>{"name": "weather", "arguments": {"city": "x"}</tool_call>', "",
         [("weather", {"city": "x"})]),
    Case(formats.Llama3Json, call("weather", PARIS, "parameters"), "", [("weather", P)]),
    Case(formats.Llama3Json, f"<|python_tag|>{call('other', TRICKY)}", "", [("other", T)]),
    Case(formats.Llama3Json, f"{call('weather', TRICKY)}; {call('now', '{}')}", "", [("weather", T), ("now", {})]),
    Case(formats.Llama3Json, '{"type": "function", "name": "now", "parameters": {}}', "", [("now", {})]),
    Case(formats.Mistral, f"[TOOL_CALLS] [{call('weather', TRICKY)}, {call('now', '{}')}]", "",
         [("weather", T), ("now", {})]),
    Case(formats.Mistral, f"Well.[TOOL_CALLS]weather{PARIS}[TOOL_CALLS]now[ARGS]{{}}", "Well.",
         [("weather", P), ("now", {})]),
    Case(formats.Mistral, f"[TOOL_CALLS]weather[CALL_ID]abc123XYZ[ARGS]{TRICKY}", "", [("weather", T)]),
    Case(formats.DeepSeekV3, "Yes." + deepseek(("weather", TRICKY), ("now", "{}")), "Yes.",
         [("weather", T), ("now", {})]),
    Case(formats.DeepSeekV3,
         f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
         "", [("weather", P)]),
    Case(formats.Granite, f"<|tool_call|>[{call('weather', TRICKY)}, {call('now', '{}')}]", "",
         [("weather", T), ("now", {})]),
    Case(formats.Granite, f"<tool_call> [{call('other', PARIS)}]", "", [("other", P)]),
    Case(formats.Granite, f"[{call('weather', PARIS)}]", "", [("weather", P)]),
    Case(qwen3_coder.Qwen3Coder,
         "I look.\n" + coder("weather", city="Pa\"r\nis", days="3", exact="true") + coder("now"),
         "I look.\n", [("weather", {"city": "Pa\"r\nis", "days": 3, "exact": True}), ("now", {})]),
    Case(qwen3_coder.Qwen3Coder, coder("weather", exact="None", near="{'x': [1, None]}", unit="C", any="5"), "",
         [("weather", {"exact": None, "near": {"x": [1, None]}, "unit": "C", "any": "5"})]),
    Case(qwen3_coder.Qwen3Coder, coder("weather", near="1.5", days="many", city="3", other="[1]"), "",
         [("weather", {"near": 1.5, "days": "many", "city": "3", "other": "[1]"})]),
    Case(qwen3_coder.Qwen3Coder, "<function=weather>\n<parameter=city>x\n<parameter=days>2</function>", "",
         [("weather", {"city": "x", "days": 2})]),
    Case(pythonic.Pythonic, "[weather(city='Paris', days=3), now()]", "", [("weather", P), ("now", {})]),
    Case(pythonic.Pythonic, 'weather(city="x")', 'weather(city="x")', []),
    Case(pythonic.Pythonic, "[weather(city='a, (b)]', near={'x': [1, (2, None)]}, exact=true, any=-x)]", "",
         [("weather", {"city": "a, (b)]", "near": {"x": [1, [2, None]]}, "exact": True, "any": "-x"})]),
]  # fmt: skip
CUT_SHORT = [
    Case(formats.Hermes, '<tool_call>{"name": "weather", "arguments": {"city": "Pa', "", [("weather", '{"city": "Pa')]),
    Case(formats.Hermes, '<tool_call>{"name": "wea', '<tool_call>{"name": "wea', []),
    Case(formats.Mistral, '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"na', ', {"na', [("now", {})]),
    Case(qwen3_coder.Qwen3Coder, "<tool_call><function=weather><parameter=city>Pa", "",
         [("weather", '{"city": "Pa')]),
    Case(qwen3_coder.Qwen3Coder, "<tool_call><function=weather><parameter=days>3\n</parameter>\n", "",
         [("weather", '{"days": 3')]),
    Case(pythonic.Pythonic, "[weather(city='Paris', days=", "", [("weather", '{"city": "Paris", "days": ')]),
    Case(formats.Llama3Json, '{"name": "weather", "param', '{"name": "weather", "param', []),
]  # fmt: skip
NO_CALLS = [
    Case(formats.Hermes, text, text, [])
    for text in ("plain", "a <tool_call", "<tool_call>no JSON</tool_call>", '<tool_call>{"name": 5}</tool_call>', " \n")
] + [
    Case(formats.Llama3Json, text, text, [])
    for text in ('{"name": "stranger", "parameters": {}}', "int f() { return {1}; }", '{"name": "now"}', "{{{")
] + [
    Case(formats.Mistral, "[TOOL_CALLS]", "[TOOL_CALLS]", []),
    Case(formats.Mistral, "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    Case(formats.DeepSeekV3, "<｜tool▁calls▁begin｜>x", "<｜tool▁calls▁begin｜>x", []),
    Case(formats.Granite, '[{"a": 1}]', '[{"a": 1}]', []),
    Case(formats.Granite, "[1, 2] and more", "[1, 2] and more", []),
    Case(qwen3_coder.Qwen3Coder, "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    Case(pythonic.Pythonic, "[stranger(a=1)]", "[stranger(a=1)]", []),
    Case(pythonic.Pythonic, "[weather(1)]", "[weather(1)]", []),
    Case(pythonic.Pythonic, "[1, 2]", "[1, 2]", []),
]  # fmt: skip
CASES = WELL_FORMED + CUT_SHORT + NO_CALLS


def said(parser: type[ToolParser], pieces: list[str]) -> Said:
    """What an answer that comes in `pieces` says."""
    running = AnswerParsing(tools=lambda: parser(TOOLS)).start()
    result = Said()
    for piece in pieces:
        result.add(running.delta(piece, None))
    result.add(running.delta("", "stop"))
    return result


def calls_of(result: Said) -> Calls:
    """(name, arguments) of each call; arguments that are no JSON stay text."""
    return [(made.name, _loaded(made.arguments)) for made in result.calls]


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
