"""Every tool format, whole and cut into pieces anywhere."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.router.answer_format import Said
from penstock.router.incremental import Arguments, CallBegins, Content, Incremental
from penstock.router.tools.parser import ToolParser
from tests.router.tools.cases import CASES, PARSERS, TOOLS, TRICKY, WELL_FORMED, Case, calls_of, said


def plain(result: Said) -> tuple[str, list[tuple[str, str]]]:
    return result.content, [(call.name, call.arguments) for call in result.calls]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parser.names[0]}-{case.text[:30]!r}")
def test_what_an_answer_says(case: Case) -> None:
    whole = said(case.parser, [case.text])
    assert (whole.content, calls_of(whole)) == (case.content, case.calls)
    assert plain(said(case.parser, list(case.text))) == plain(whole)
    assert len({call.call_id for call in whole.calls}) == len(whole.calls)
    assert whole.finish_reason == ("tool_calls" if case.calls else "stop")


FRAGMENTS = sorted(
    {
        *(marker for parser in PARSERS for marker in parser.markers),
        *'{}[]()"\'\\,:;=<>` \n',
        '"name"', '"arguments"', '"parameters"', '"weather"', '"now"', "weather", "now", "function", "```json", "null",
        "<function=", "<parameter=", "</function>", "</parameter>", "weather(", "city=", "1", "'x'", '{"name": "now"',
        '{"name": "weather", "arguments": {"city": "', "[{", "\\ud800", "é😀", "<tool", "｜>", "\\u00", "-1e999",
    }
)  # fmt: skip


@st.composite
def answers(draw: st.DrawFn) -> tuple[type[ToolParser], str]:
    """A parser and a text: a case with pieces of other ones put in, or fragments alone."""
    parser = draw(st.sampled_from(PARSERS))
    fragments = draw(st.lists(st.sampled_from(FRAGMENTS), max_size=8))
    text = draw(st.sampled_from(["", *(case.text for case in CASES if case.parser is parser)]))
    for fragment in fragments:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + fragment + text[at + draw(st.integers(0, 3)) :]
    return parser, text


@st.composite
def cut(draw: st.DrawFn) -> tuple[type[ToolParser], list[str]]:
    parser, text = draw(answers())
    at = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return parser, [text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)]


@settings(max_examples=600, deadline=None)
@given(cut())
def test_any_text_in_any_pieces(answer: tuple[type[ToolParser], list[str]]) -> None:
    parser, pieces = answer
    text = "".join(pieces)
    whole = said(parser, [text])
    assert plain(said(parser, pieces)) == plain(whole)
    if not whole.calls:
        assert whole.content == text, "what is no call is content, all of it"
    "".join([whole.content, *(call.name + call.arguments for call in whole.calls)]).encode()


@pytest.mark.parametrize("case", [case for case in WELL_FORMED if TRICKY in case.text], ids=repr)
def test_arguments_come_as_they_are_written(case: Case) -> None:
    running = Incremental(case.parser(TOOLS).parse)
    pieces = [event.text for char in case.text for event in running.push(char) if isinstance(event, Arguments)]
    assert max(map(len, pieces)) == 2, "nothing waits, but for the end of an escape"
    assert "".join(pieces).startswith(TRICKY)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.names[0])
def test_plain_text_is_not_held_back(parser: type[ToolParser]) -> None:
    running = Incremental(parser(TOOLS).parse)
    for word in ("The ", "wheel ", "turns", ", ", "and ", "turns."):
        assert running.push(word) == [Content(word)]
    assert running.finish() == []


def test_a_marker_is_held_back_only_while_it_can_be_one() -> None:
    running = Incremental(PARSERS[0](TOOLS).parse)
    assert running.push("a <to") == [Content("a ")]
    assert running.push("ol") == []
    assert running.push("s>") == [Content("<tools>")]


def test_the_name_comes_before_the_arguments_do() -> None:
    running = Incremental(PARSERS[0](TOOLS).parse)
    assert running.push('<tool_call>\n{"name": "weather"') == [CallBegins("weather")]
    assert running.push(', "arguments": {"ci') == [Arguments('{"ci')]
    assert running.push('ty": "x\\') == [Arguments('ty": "x')]
    assert running.push('""}') == [Arguments('\\""}')]


def test_strings_of_xml_parameters_are_streamed() -> None:
    running = Incremental(PARSERS[5](TOOLS).parse)
    events: list[Any] = running.push("<tool_call>\n<function=weather>\n<parameter=city>\nA lo")
    assert events[-1] == Arguments("A lo")
    assert running.push('ng "text"\nof') == [Arguments('ng \\"text\\"\\nof')]
    assert running.push("\n</para") == []
    assert running.push("meter>")[0] == Arguments('"')
