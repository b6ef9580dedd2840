"""From the text of a parameter to JSON of the type that the tool's schema asks for."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Callable, Mapping, Set
from typing import Any, NoReturn

_MAX_DEPTH = 8  # of references and alternatives
_OF_VALUE: dict[type, str] = {
    bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object", type(None): "null",
}  # fmt: skip
_PYTHON_NAMES = {
    "int": "integer", "float": "number", "bool": "boolean", "str": "string", "dict": "object", "list": "array",
}  # fmt: skip


def types_of(schema: Mapping[str, Any], parameter: str) -> Set[str]:
    """JSON types that a parameter of this schema may have; a string if nothing is known."""
    properties = schema.get("properties")
    own = properties.get(parameter) if isinstance(properties, dict) else None
    return _types(own, schema, _MAX_DEPTH) or {"string"}


def as_json(text: str, types: Set[str]) -> str:
    """JSON of `text` as the first of `types` that it can be, else as any value, else as a string."""
    for kind, read in _READERS:
        if kind in types:
            try:
                return read(text)
            except (ValueError, LookupError):
                continue
    if "string" not in types:
        try:
            return _valid(text)
        except ValueError:
            pass
    return json_of(text)


def python_as_json(text: str) -> str:
    """JSON of a Python literal, or of JSON's own; of any other expression, its text as a string."""
    for read in (_literal, _valid):
        try:
            return read(text)
        except ValueError:
            continue
    return json_of(text.strip())


def json_of(value: object) -> str:
    """JSON as models write it.

    Raises:
        ValueError: JSON has no such value.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(value, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _types(own: object, root: Mapping[str, Any], depth: int) -> set[str]:
    if not isinstance(own, dict) or depth == 0:
        return set()
    named = own.get("type")
    types = {name.lower() for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)}
    types = {_PYTHON_NAMES.get(name, name) for name in types}
    for keyword in ("anyOf", "oneOf", "allOf"):
        alternatives = own.get(keyword)
        for alternative in alternatives if isinstance(alternatives, list) else []:
            types |= _types(alternative, root, depth - 1)
    if isinstance(own.get("$ref"), str):
        types |= _types(_referred(own["$ref"], root), root, depth - 1)
    if not types:
        values = [own["const"]] if "const" in own else own.get("enum")
        types = {_OF_VALUE[type(value)] for value in (values if isinstance(values, list) else [])}
    return types


def _referred(reference: str, root: object) -> object:
    if not reference.startswith("#/"):
        return None
    for key in reference[2:].split("/"):
        root = root.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root


def _valid(text: str) -> str:
    """`text` itself, if it is JSON."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("too deep") from error
    return text.strip()


def _literal(text: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that Python does not know stand for themselves
            return json_of(ast.literal_eval(text.strip()))
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _null(text: str) -> str:
    return {"null": "null", "none": "null"}[text.strip().lower()]


def _boolean(text: str) -> str:
    return {"true": "true", "1": "true", "false": "false", "0": "false"}[text.strip().lower()]


def _integer(text: str) -> str:
    return str(int(text))


def _number(text: str) -> str:
    try:
        return _integer(text)
    except ValueError:
        value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return repr(value)


def _container(text: str) -> str:
    """An object or a list; models also write Python literals."""
    try:
        written = _valid(text)
    except ValueError:
        written = _literal(text)
    if not written.startswith(("{", "[")):
        raise ValueError(text)
    return written


_READERS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("null", _null), ("integer", _integer), ("number", _number), ("boolean", _boolean), ("object", _container),
    ("array", _container),
)  # fmt: skip
