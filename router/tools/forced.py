"""Calls that the client demands: the output is constrained to JSON, so that no format of the model's is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.router.incremental import Arguments, CallBegins, CallEnds, Steps, Text
from penstock.router.tools.json_calls import json_call_list
from penstock.router.tools.parser import ToolParser
from penstock.router.tools.request import ToolUse

Schema = Mapping[str, Any]


class RequiredCalls(ToolParser):
    """tool_choice "required": a list of calls."""

    names = ()

    def parse(self, text: Text) -> Steps[None]:
        """See `ToolParser`."""
        yield from text.spaces()
        yield from text.attempt(json_call_list(text))


class NamedCall(ToolParser):
    """A named tool: the output is its arguments. `tools` has this one only."""

    names = ()

    def parse(self, text: Text) -> Steps[None]:
        """See `ToolParser`."""
        yield from text.spaces()
        if (yield from text.peek()):
            [name] = self.tools
            yield CallBegins(name)
            yield from text.json(Arguments)
            yield CallEnds()
            yield from text.spaces()


def forced_schema(use: ToolUse, one_call: bool) -> dict[str, Any]:
    """JSON schema of an output that is the call or the calls demanded."""
    tools = use.tools or {}
    return _object(tools[use.named]) if use.named else _calls(tools, one_call)


def _calls(tools: Mapping[str, Schema], one_call: bool) -> dict[str, Any]:
    """At least one call; each tool's own references stay within its schema."""
    names = {name: f"tool{at}" for at, name in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{names[name]}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in tools
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if one_call:
        schema["maxItems"] = 1
    schema["$defs"] = {names[name]: _moved(_object(tool), f"#/$defs/{names[name]}") for name, tool in tools.items()}
    return schema


def _object(tool: Schema) -> dict[str, Any]:
    return {"type": "object", **tool}


def _moved(schema: Any, to: str) -> Any:
    """A schema whose references still hold when it stands at `to`."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, to) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = to + reference[1:]
    return moved
