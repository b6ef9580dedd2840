"""Random JSON schemas, those that are supported and those that are not, and random outputs that follow a grammar."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
from llguidance import LLMatcher

_UNSUPPORTED: tuple[dict[str, Any], ...] = (
    {"not": {"type": "null"}},
    {"uniqueItems": True},
    {"contains": {"type": "string"}},
    {"propertyNames": {"maxLength": 3}},
    {"dependentRequired": {"a": ["b"]}},
    {"if": {"type": "string"}, "then": {"minLength": 1}},
    {"unevaluatedProperties": False},
    {"minProperties": 3},
)
_PATTERNS = ("^[a-z]{2,4}$", "^x[0-9]+$", "a|b", "^(on|off)$", "[A-Z][a-z]+")
_WORDS = ("id", "name", "age", "tags", "a b", "é", "日本", "x-1", 'q"q', "back\\slash", "")


def random_schema(rng: random.Random, *, unsupported: bool = False, depth: int = 3) -> dict[str, Any]:
    """A schema of objects, arrays, strings, numbers, enums, unions and references.

    With `unsupported` it holds one keyword, somewhere, that no grammar is made of.
    """
    maker = _Maker(rng)
    schema = maker.schema(depth)
    if maker.definitions:
        schema["$defs"] = maker.definitions
    if unsupported:
        target = schema
        while target.get("properties") and rng.random() < 0.7:
            target = target["properties"][rng.choice(list(target["properties"]))]
        target.update(rng.choice(_UNSUPPORTED))
        target.pop("required", None)
    return schema


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Any] = {}

    def schema(self, depth: int) -> dict[str, Any]:
        simple = [self.string, self.integer, self.number, self.boolean, self.enum, self.const]
        nested: list[Callable[[int], dict[str, Any]]] = [self.object, self.object, self.array, self.union, self.ref]
        if depth > 0 and self.rng.random() < 0.75:
            return self.rng.choice(nested)(depth - 1)
        return self.rng.choice(simple)()

    def string(self) -> dict[str, Any]:
        kind = self.rng.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": self.rng.choice(_PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self.rng.choice(["date", "uuid", "ipv4", "time"])}
        least = self.rng.randrange(4)
        return {"type": "string", "minLength": least, "maxLength": least + self.rng.randrange(12)}

    def integer(self) -> dict[str, Any]:
        low = self.rng.randrange(-2000, 2000)
        found = {"type": "integer", "minimum": low, "maximum": low + self.rng.randrange(5000)}
        if self.rng.random() < 0.2:
            found = {"type": "integer", "exclusiveMinimum": low, "multipleOf": self.rng.choice([2, 3, 5])}
        return found

    def number(self) -> dict[str, Any]:
        low = round(self.rng.uniform(-100, 100), 2)
        return {"type": "number", "minimum": low, "exclusiveMaximum": low + self.rng.randrange(1, 50)}

    def boolean(self) -> dict[str, Any]:
        return {"type": self.rng.choice([["boolean", "null"], ["boolean"], ["null"]])}

    def enum(self) -> dict[str, Any]:
        values: list[Any] = [*_WORDS, 1, -2.5, None, True, [1, "a"], {"k": "v"}]
        return {"enum": self.rng.sample(values, self.rng.randrange(1, 6))}

    def const(self) -> dict[str, Any]:
        return {"const": self.rng.choice([*_WORDS, 7, {"a": [1, 2]}, []])}

    def object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(_WORDS, self.rng.randrange(1, 5))
        found: dict[str, Any] = {"type": "object", "properties": {name: self.schema(depth) for name in names}}
        found["required"] = [name for name in names if self.rng.random() < 0.6]
        kind = self.rng.randrange(4)
        if kind == 0:
            found["additionalProperties"] = self.schema(0)
        elif kind < 3:
            found["additionalProperties"] = False
        elif not set(found["required"]) & {"p1"}:
            found["patternProperties"] = {"^p[0-9]$": self.schema(0)}
            found["additionalProperties"] = False
        return found

    def array(self, depth: int) -> dict[str, Any]:
        least = self.rng.randrange(3)
        found: dict[str, Any] = {"type": "array", "items": self.schema(depth)}
        found |= {"minItems": least, "maxItems": least + self.rng.randrange(3)}
        if self.rng.random() < 0.2:
            found |= {"prefixItems": [self.schema(0), self.schema(0)], "minItems": 2, "maxItems": 4}
        return found

    def union(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth) for _ in range(self.rng.randrange(1, 4))]}

    def ref(self, depth: int) -> dict[str, Any]:
        name = f"d{len(self.definitions)}"
        self.definitions[name] = {}
        self.definitions[name] = self.schema(depth)
        return {"$ref": f"#/$defs/{name}"}


def walk(matcher: LLMatcher, rng: random.Random, ends: list[int], limit: int = 400) -> list[int] | None:
    """Tokens drawn at random among those allowed until the output may end; None if it did not within the limit."""
    matcher = matcher.deep_copy()
    tokens: list[int] = []
    while len(tokens) < limit:
        mask = matcher.compute_bitmask()
        assert not matcher.is_error(), matcher.get_error()
        allowed = [8 * at + bit for at, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]
        if any(end in allowed for end in ends) and (len(allowed) == len(ends) or rng.random() < 0.3):
            return tokens
        token = rng.choice([token for token in allowed if token not in ends])
        assert matcher.consume_token(token), matcher.get_error()
        tokens.append(token)
        if matcher.is_stopped():
            return tokens
    return None


def validate(schema: dict[str, Any], text: str) -> None:
    """Raises what is wrong with an output that is said to follow a schema."""
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
