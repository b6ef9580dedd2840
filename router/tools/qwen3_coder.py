"""Qwen3-Coder's calls: XML whose parameters become JSON by the types of the tool's schema.

<tool_call>
<function=f>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.router.incremental import Arguments, CallBegins, CallEnds, Content, Steps, Text, capture
from penstock.router.tools.formats import closing
from penstock.router.tools.parser import ToolParser
from penstock.router.tools.schema_types import as_json, json_of, types_of

_ENDS = ("\n</parameter>", "</parameter>", "\n<parameter=", "<parameter=", "\n</function>", "</function>")


class Qwen3Coder(ToolParser):
    """Strings are streamed as they come, other values when they are complete."""

    names = ("qwen3_coder", "qwen3_xml")
    markers = ("<tool_call>", "</tool_call>")

    def parse(self, text: Text) -> Steps[None]:
        """See `ToolParser`. The model sometimes leaves `<tool_call>` out."""
        while marker := (yield from text.until(("<tool_call>", "<function="))):
            if not (yield from text.attempt(self._call(text, marker))):
                yield Content(marker)

    def _call(self, text: Text, marker: str) -> Steps[bool]:
        if marker == "<tool_call>":
            yield from text.spaces()
            if not (yield from text.accept("<function=")):
                return False
        name = yield from text.word()
        if not name or not (yield from text.accept(">")):
            return False
        yield CallBegins(name)
        yield Arguments("{")
        schema = self.tools.get(name, {})
        first = True
        while (yield from text.attempt(closing(text, "<parameter="))):
            yield from self._parameter(text, schema, first)
            first = False
        yield from text.spaces()
        if (yield from text.peek()):  # else the answer was cut short: nobody must take what there is for all of it
            yield Arguments("}")
        yield CallEnds()
        yield from text.attempt(closing(text, "</function>"))
        yield from text.attempt(closing(text, "</tool_call>"))
        return True

    def _parameter(self, text: Text, schema: Mapping[str, Any], first: bool) -> Steps[None]:
        key, marker = yield from capture(text.until((">",)))
        opening = f"{'' if first else ', '}{json_of(key)}"
        yield Arguments(f"{opening}: " if marker else opening[:-1])
        if not marker:
            return
        yield from text.accept("\n")
        types = types_of(schema, key)
        if types == {"string"}:
            yield Arguments('"')
            end = yield from text.until(_ENDS, lambda piece: Arguments(json_of(piece)[1:-1]))
            if end:
                yield Arguments('"')
        else:
            value, end = yield from capture(text.until(_ENDS))
            yield Arguments(as_json(value, types) if end else value)
        if end.lstrip("\n") != "</parameter>":  # it was forgotten
            text.unread(end.lstrip("\n"))
