"""The page at /docs: the OpenAPI document as HTML, no script and nothing from elsewhere. Pure; for app.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --soft: #77829a; --line: #8884; --main: #2d7fc1; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }
h1 small, p, td:last-child { color: var(--soft); } a { color: var(--main); text-decoration: none; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 6px 0; padding: 6px 12px; }
summary { cursor: pointer; overflow-wrap: anywhere; }
summary b { display: inline-block; min-width: 4.5em; color: var(--main); }
table { border-collapse: collapse; width: 100%; font-size: 14px; } td { text-align: left; vertical-align: top;
  padding: 2px 12px 2px 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
code { font-family: ui-monospace, monospace; } :target { outline: 2px solid var(--main); }
"""


def docs_page(document: Mapping[str, Any]) -> str:
    """All operations, then all schemas that they refer to."""
    title, version = escape(document["info"]["title"]), escape(document["info"]["version"])
    operations = [
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in sorted(document["components"]["schemas"].items())]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: its API</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title} <small>{version}</small></h1>"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>. To try it: <a href="ui">a chat</a>.</p>'
        f"<h2>Routes</h2>{''.join(operations)}<h2>Bodies and answers</h2>{''.join(schemas)}</body></html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    key = " <small>(with a key)</small>" if operation.get("security") else ""
    rows = [
        (escape(parameter["name"]), _type(parameter["schema"]), f"in the {escape(parameter['in'])}")
        for parameter in operation.get("parameters", ())
    ]
    if body := operation.get("requestBody"):
        rows.append(("body", _content(body["content"]), ""))
    for status, answer in operation["responses"].items():
        rows.append((escape(status), _content(answer["content"]), escape(answer["description"])))
    summary = f"<b>{escape(method.upper())}</b> <code>{escape(path)}</code> {escape(operation['summary'])}{key}"
    return f'<details id="{escape(operation["operationId"])}"><summary>{summary}</summary>{_table(rows)}</details>'


def _content(content: Mapping[str, Any]) -> str:
    """Of each media type; JSON goes without saying."""
    return "<br>".join(
        _type(each["schema"])
        if kind == "application/json"
        else f"{escape(kind)} {escape(each['schema'].get('description', ''))}"
        for kind, each in content.items()
    )


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (f"<code>{escape(field)}</code>", _type(kind), "required" if field in required else _default(kind))
        for field, kind in schema.get("properties", {}).items()
    ]
    told = f"<p>{escape(schema.get('description', ''))}</p>"
    heading = f"<summary>{escape(_short(name))}</summary>"
    return f'<details id="{escape(name)}">{heading}{told}{_table(rows)}</details>'


def _type(schema: Mapping[str, Any]) -> str:
    """A type in words, with links to the schemas."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{escape(name)}">{escape(_short(name))}</a>'
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(schema.get('items') or {})}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return escape(kind)


def _default(schema: Mapping[str, Any]) -> str:
    return "" if schema.get("default") is None else f"default: <code>{escape(json.dumps(schema['default']))}</code>"


def _short(name: str) -> str:
    """Two schemas of one name are told apart by the module before it."""
    return " ".join(name.split(".")[-3::2]) if "." in name else name


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
