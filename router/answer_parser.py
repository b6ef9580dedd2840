"""From the text of a choice to its `Delta`s: reasoning, content and tool calls told apart, as they come. Pure.

The plan of a request has an `AnswerParsing` if there is anything to tell apart; reply.py starts an `AnswerParser` for
each choice. Streamed and whole answers go through the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.router.answer_format import CallDelta, Delta
from penstock.router.incremental import Arguments, CallBegins, Content, Event, Incremental, Reasoning, Steps, Text
from penstock.router.reasoning.parser import ReasoningParser
from penstock.router.tools.parser import ToolParser


@dataclass(frozen=True, kw_only=True)
class AnswerParsing:
    """How to read the answers of one request; each choice has parsers of its own.

    `one_call`: all but the first call are dropped (parallel_tool_calls=false). `named`: the client has chosen the
    tool, so its call is a normal end ("stop"), as in OpenAI's API. `show_reasoning`: else it is dropped.
    `shown_ids` are the special tokens that have to be in the text.
    """

    reasoning: Callable[[], ReasoningParser] | None = None
    tools: Callable[[], ToolParser] | None = None
    one_call: bool = False
    named: bool = False
    show_reasoning: bool = True
    shown_ids: frozenset[int] = frozenset()

    def start(self) -> AnswerParser:
        """A parser for one choice."""
        return AnswerParser(self)


class AnswerParser:
    """One choice: `push` its text, then `finish`.

    White space next to calls is layout, not content: it is held back until text follows, and dropped if a call does.
    """

    def __init__(self, parsing: AnswerParsing) -> None:
        self._parsing = parsing
        self._reasoning = None if parsing.reasoning is None else parsing.reasoning()
        self._tools = None if parsing.tools is None else parsing.tools()
        self._incremental = Incremental(self._parse)
        self._calls = 0
        self._blank = ""  # held back
        self._in_text = False

    def delta(self, text: str, finish_reason: str | None) -> Delta:
        """What `text` says; with `finish_reason`, everything that was held back, too."""
        events = self._incremental.push(text) if text else []
        if finish_reason is not None:
            events += self._incremental.finish()
        content, reasoning = "", ""
        calls: dict[int, CallDelta] = {}  # clients add up what a chunk has of a call only if it is in one piece
        for event in events:
            if isinstance(event, Reasoning):
                reasoning += event.text
            elif isinstance(event, Content):
                content += self._content(event.text)
            else:
                self._call(event, calls)
        if finish_reason is not None and self._calls == 0:
            content += self._blank
        if finish_reason == "stop" and self._calls and not self._parsing.named:
            finish_reason = "tool_calls"
        shown = reasoning if self._parsing.show_reasoning else ""
        return Delta(content, shown, tuple(calls.values()), finish_reason=finish_reason)

    def _parse(self, text: Text) -> Steps[None]:
        if self._reasoning is not None:
            yield from self._reasoning.parse(text)
        if self._tools is not None:
            yield from self._tools.parse(text)

    def _content(self, text: str) -> str:
        if self._in_text or self._tools is None:
            return text
        self._blank += text
        if not self._blank.strip():
            return ""
        text, self._blank, self._in_text = self._blank, "", True
        return text

    def _call(self, event: Event, calls: dict[int, CallDelta]) -> None:
        if isinstance(event, CallBegins):
            self._calls += 1
            self._blank, self._in_text = "", False
        index = self._calls - 1
        if index and self._parsing.one_call:
            return
        if isinstance(event, CallBegins):
            assert self._tools is not None
            calls[index] = CallDelta(index, call_id=self._tools.call_id(), name=event.name)
        elif isinstance(event, Arguments):
            so_far = calls.get(index, CallDelta(index))
            calls[index] = so_far._replace(arguments=so_far.arguments + event.text)
