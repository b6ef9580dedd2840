"""Formats that wrap JSON calls into markers of their own. Sources: the models' chat templates and vLLM's examples."""

from __future__ import annotations

from collections.abc import Collection

from penstock.router.incremental import Arguments, CallBegins, CallEnds, Content, Steps, Text
from penstock.router.tools.json_calls import json_call, json_call_list
from penstock.router.tools.parser import ToolParser


class Hermes(ToolParser):
    """`<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, one after another. Qwen2.5, Qwen3, Hermes."""

    names = ("hermes",)
    markers = ("<tool_call>", "</tool_call>")

    def parse(self, text: Text) -> Steps[None]:
        """See `ToolParser`."""
        while marker := (yield from text.until(("<tool_call>",))):
            if not (yield from text.attempt(self._call(text))):
                yield Content(marker)

    def _call(self, text: Text) -> Steps[bool]:
        yield from text.spaces()
        if not (yield from json_call(text)):
            return False
        yield from text.attempt(closing(text, "</tool_call>"))
        return True


class Llama3Json(ToolParser):
    """`{"name": "f", "parameters": {...}}`, several joined by `;`, maybe behind `<|python_tag|>`. Llama 3.1 to 4."""

    names = ("llama3_json", "llama4_json")
    markers = ("<|python_tag|>",)

    def parse(self, text: Text) -> Steps[None]:
        """See `ToolParser`. Without the tag only an object that calls a tool of the request is a call."""
        while marker := (yield from text.until(("<|python_tag|>", "{"))):
            if not (yield from text.attempt(self._calls(text, marker))):
                yield Content(marker)

    def _calls(self, text: Text, marker: str) -> Steps[bool]:
        known = self.tools if marker == "{" else None
        if marker == "{":
            text.unread(marker)
        else:
            yield from text.spaces()
        if not (yield from json_call(text, known)):
            return False
        while (yield from text.attempt(self._next_call(text, known))):
            pass
        return True

    def _next_call(self, text: Text, known: Collection[str] | None) -> Steps[bool]:
        yield from text.spaces()
        if not (yield from text.accept(";")):
            return False
        yield from text.spaces()
        return (yield from json_call(text, known))


class Mistral(ToolParser):
    """`[TOOL_CALLS]` before a list of JSON calls (older), or before each `name{...}` or `name[ARGS]{...}`."""

    names = ("mistral",)
    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def parse(self, text: Text) -> Steps[None]:
        """See `ToolParser`."""
        while marker := (yield from text.until(("[TOOL_CALLS]",))):
            if not (yield from text.attempt(self._calls(text))):
                yield Content(marker)

    def _calls(self, text: Text) -> Steps[bool]:
        yield from text.spaces()
        first = yield from text.peek()
        if first == "[":
            return (yield from json_call_list(text))
        if first == "{":
            return (yield from json_call(text))
        name = yield from text.word()
        if (yield from text.accept("[CALL_ID]")):
            yield from text.word()
        yield from text.accept("[ARGS]")
        yield from text.spaces()
        if not name or (yield from text.peek()) != "{":
            return False
        yield CallBegins(name)
        yield from text.json(Arguments)
        yield CallEnds()
        return True

    @staticmethod
    def call_id() -> str:
        """Mistral's templates take ids of nine letters and digits only."""
        return ToolParser.call_id()[-9:]


class DeepSeekV3(ToolParser):
    """`<｜tool▁calls▁begin｜>`, and for each call `function<｜tool▁sep｜>f`, then a fenced JSON object. V3, R1.

    V3.1 writes `f<｜tool▁sep｜>{...}`: that is read, too.
    """

    names = ("deepseek_v3", "deepseek_v31")
    BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    markers = (BEGIN, END, CALL, SEPARATOR, CALL_END)

    def parse(self, text: Text) -> Steps[None]:
        """See `ToolParser`."""
        while marker := (yield from text.until((self.BEGIN, self.CALL))):
            if not (yield from text.attempt(self._call(text, marker))):
                yield Content(marker)

    def _call(self, text: Text, marker: str) -> Steps[bool]:
        if marker == self.BEGIN:
            yield from text.spaces()
            if not (yield from text.accept(self.CALL)):
                return False
        name = yield from text.word()
        if not (yield from text.accept(self.SEPARATOR)):
            return False
        yield from text.spaces()
        if (yield from text.peek()) != "{":
            name = yield from text.word()
            yield from text.spaces()
            yield from text.accept("```json")
            yield from text.spaces()
        if not name or (yield from text.peek()) != "{":
            return False
        yield CallBegins(name)
        yield from text.json(Arguments)
        yield CallEnds()
        for literal in ("```", self.CALL_END, self.END):
            yield from text.attempt(closing(text, literal))
        return True


class Granite(ToolParser):
    """A list of JSON calls, behind `<|tool_call|>` (3.0) or `<tool_call>` (3.1), or the whole answer. IBM Granite."""

    names = ("granite",)
    markers = ("<|tool_call|>", "<tool_call>")

    def parse(self, text: Text) -> Steps[None]:
        """See `ToolParser`."""
        yield from text.attempt(self._calls(text, self.tools))
        while marker := (yield from text.until(self.markers)):
            if not (yield from text.attempt(self._calls(text, None))):
                yield Content(marker)

    def _calls(self, text: Text, known: Collection[str] | None) -> Steps[bool]:
        yield from text.spaces()
        return (yield from json_call_list(text, known))


def closing(text: Text, literal: str) -> Steps[bool]:
    """White space and `literal`."""
    yield from text.spaces()
    return bool((yield from text.accept(literal)))
