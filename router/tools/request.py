"""What a chat request says about tools: which there are, and whether the model may, must or must not call one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from penstock.common.errors import BadRequest

MAX_TOOLS = 1024
_NAME = re.compile(r"[^\s\x00-\x1f\"'<>{}()\[\]=,;:]{1,256}")
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class ToolUse:
    """`tools` maps names to their parameters' JSON schemas; `named` is the one that has to be called."""

    mode: Literal["none", "auto", "required", "named"] = "none"
    tools: Mapping[str, Mapping[str, Any]] | None = None
    named: str = ""


def tool_use(tools: Sequence[Any] | None, choice: object) -> ToolUse:
    """What `tools` and `tool_choice` ask for.

    Raises:
        BadRequest: one of them is wrong; names the place.
    """
    schemas = _schemas(tools or ())
    if choice is None:
        choice = "auto" if schemas else "none"
    if choice == "none":
        return ToolUse("none", schemas)
    if not schemas:
        raise BadRequest("tool_choice needs tools", param="tool_choice")
    if choice == "auto":
        return ToolUse("auto", schemas)
    if choice == "required":
        return ToolUse("required", schemas)
    name = _named(choice)
    if name not in schemas:
        raise BadRequest(f"tool_choice: there is no tool {name!r} in tools", param="tool_choice")
    return ToolUse("named", schemas, name)


def check_tool_count(tools: Sequence[Any] | None) -> None:
    """Raise BadRequest for more tools than are looked at: each is, and a client's turn keeps the others waiting."""
    if tools and len(tools) > MAX_TOOLS:
        raise BadRequest(f"tools must be at most {MAX_TOOLS}", param="tools")


def _named(choice: object) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        forms = f'{", ".join(_CHOICES)} or {{"type": "function", "function": {{"name": …}}}}'
        raise BadRequest(f"tool_choice must be {forms}", param="tool_choice")
    return name


def _schemas(tools: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    check_tool_count(tools)
    schemas: dict[str, Mapping[str, Any]] = {}
    for at, tool in enumerate(tools):
        where = f"tools[{at}]"
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise BadRequest(f"{where} must be a tool of type 'function'", param=where)
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            place = f"{where}.function.name"
            raise BadRequest(f"{place} must be a name without spaces, quotes and brackets", param=place)
        if name in schemas:
            raise BadRequest(f"{where}.function.name: {name!r} is there twice", param=f"{where}.function.name")
        if schema is not None and not isinstance(schema, dict):
            place = f"{where}.function.parameters"
            raise BadRequest(f"{place} must be a JSON schema of an object", param=place)
        schemas[name] = schema or {}
    return schemas
