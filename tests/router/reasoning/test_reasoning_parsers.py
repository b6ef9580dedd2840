"""Every reasoning format, alone and before tool calls, in one piece and in many."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.router.answer_format import Said
from penstock.router.answer_parser import AnswerParsing
from penstock.router.reasoning.formats import DeepSeekR1, Granite, Mistral, Qwen3
from penstock.router.reasoning.parser import Beginning, ReasoningParser
from penstock.router.tools.formats import Hermes

CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
NOTHING = Beginning()
OPEN = Beginning("<|assistant|>\n<think>\n")
CLOSED = Beginning("<|assistant|>\n<think>\n\n</think>\n\n")
CASES: list[tuple[type[ReasoningParser], Beginning, str, str, str, int]] = [
    # parser, beginning, text, reasoning, content, calls
    (DeepSeekR1, NOTHING, "I think.</think>It is.", "I think.", "It is.", 0),
    (DeepSeekR1, NOTHING, "<think>I think.</think>It is.", "I think.", "It is.", 0),
    (DeepSeekR1, NOTHING, "cut sho", "cut sho", "", 0),
    (DeepSeekR1, OPEN, "\nI think\n</think>\n\nIt is.", "\nI think\n", "\n\nIt is.", 0),
    (DeepSeekR1, CLOSED, "It is.", "", "It is.", 0),
    (DeepSeekR1, NOTHING, f"x{CALL}</think>{CALL}", f"x{CALL}", "", 1),
    (DeepSeekR1, Beginning("<think>a</think>It", True), " is.", "", " is.", 0),
    (DeepSeekR1, Beginning("<think>a", True), "b</think>c", "b", "c", 0),
    (DeepSeekR1, Beginning("It", True), " is.", "", " is.", 0),
    (DeepSeekR1, Beginning("<｜User｜>what is </think>?<｜Assistant｜>"), "hm</think>c", "hm", "c", 0),
    (Qwen3, OPEN, f"Let me look.\n{CALL}", "Let me look.\n", "", 1),
    (Qwen3, NOTHING, f"<think>\nso\n</think>\n\n{CALL}", "\nso\n", "", 1),
    (Qwen3, Beginning(thinking=False), "It is.", "", "It is.", 0),
    (Qwen3, CLOSED, CALL, "", "", 1),
    (Mistral, NOTHING, "[THINK]a[/THINK]b", "a", "b", 0),
    (Mistral, NOTHING, "b, plainly", "", "b, plainly", 0),
    (Mistral, Beginning("[INST]x[/INST][THINK]"), "a[/THINK]b", "a", "b", 0),
    (Granite, NOTHING, "Here is my thought process: a Here's my response: b", " a ", " b", 0),
    (Granite, NOTHING, "Here is what you asked for.", "", "Here is what you asked for.", 0),
    (Granite, NOTHING, "Here's my thought process: cut", " cut", "", 0),
]


def said(parser: type[ReasoningParser], beginning: Beginning, pieces: list[str], show: bool = True) -> Said:
    parsing = AnswerParsing(reasoning=lambda: parser(beginning), tools=lambda: Hermes({}), show_reasoning=show)
    running = parsing.start()
    result = Said()
    for piece in pieces:
        result.add(running.delta(piece, None))
    result.add(running.delta("", "stop"))
    return result


def plain(result: Said) -> tuple[str, str, list[tuple[str, str]]]:
    return result.reasoning, result.content, [(call.name, call.arguments) for call in result.calls]


@pytest.mark.parametrize(("parser", "beginning", "text", "reasoning", "content", "calls"), CASES)
def test_what_an_answer_says(
    parser: type[ReasoningParser], beginning: Beginning, text: str, reasoning: str, content: str, calls: int
) -> None:
    whole = said(parser, beginning, [text])
    assert (whole.reasoning, whole.content, len(whole.calls)) == (reasoning, content, calls)
    assert plain(said(parser, beginning, list(text))) == plain(whole)
    assert said(parser, beginning, [text], show=False).reasoning == ""


FRAGMENTS = [
    "<think>", "</think>", "[THINK]", "[/THINK]", "Here is my ", "Here's my ", "thought process:", "response:", "Here",
    CALL, "<tool_call>", " ", "\n", "a", "<", "[", "/",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([DeepSeekR1, Qwen3, Mistral, Granite]),
    st.sampled_from([NOTHING, OPEN, CLOSED, Beginning(thinking=False)]),
    st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join),
    st.lists(st.integers(0, 200), max_size=10),
)
def test_any_text_in_any_pieces(
    parser: type[ReasoningParser], beginning: Beginning, text: str, cuts: list[int]
) -> None:
    at = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)]
    whole = said(parser, beginning, [text])
    assert plain(said(parser, beginning, pieces)) == plain(whole)
    if not whole.calls and not whole.reasoning and not any(marker in text for marker in (*parser.starts, *parser.ends)):
        assert whole.content == text
