"""Structural tags as a Lark grammar: free text in which certain beginnings make what follows take a form.

Both ways of writing one are understood: {"triggers": [...], "structures": [{"begin", "schema", "end"}]}, and the newer
{"format": ...} with nested formats (https://xgrammar.mlc.ai, "Structural Tag"). Called by common/grammar.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

TEXT = r"/(.|\n)*/"
_Json = dict[str, Any]


def structural_tag_grammar(
    tag: _Json, special_tokens: Mapping[str, int], json_rule: Callable[[_Json], str], regex_rule: Callable[[str], str]
) -> str:
    """The grammar of a structural tag.

    Args:
        tag: the parsed object; a "type" beside it means nothing.
        special_tokens: text -> id of tokens that no text can spell.
        json_rule, regex_rule: a schema, and a regular expression, as an expression of the grammar.

    Raises:
        ValueError: it is not one, or asks for a format that is not known here.
    """
    lowering = _Lowering(special_tokens, json_rule, regex_rule)
    if "format" in tag:
        start = lowering.format(_object(tag["format"], "format"), "format")
    else:
        start = lowering.triggered(_from_structures(tag), "structures")
    return "\n".join(["%llguidance {}", f"start: {start}", *lowering.rules])


class _Lowering:
    """Collects the rules of one grammar; each format becomes an expression."""

    def __init__(
        self, special_tokens: Mapping[str, int], json_rule: Callable[[_Json], str], regex_rule: Callable[[str], str]
    ) -> None:
        self.rules = [f"TEXT: {TEXT}"]
        self._ids = special_tokens
        self._json, self._regex = json_rule, regex_rule
        names = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    def format(self, value: _Json, at: str) -> str:
        """The expression of any format; `at` is where it stands, for errors."""
        kind = value.get("type")
        if kind == "const_string":
            return self.literal(_text(value, "value", at))
        if kind == "json_schema":
            return self._json(_object(value.get("json_schema"), f"{at}.json_schema"))
        if kind == "regex":
            return self._regex(_text(value, "pattern", at))
        if kind == "any_text":
            return "TEXT"
        if kind in ("sequence", "or"):
            elements = _list(value, "elements", at)
            parts = [self.format(_object(part, at), f"{at}.elements[{i}]") for i, part in enumerate(elements)]
            if kind == "sequence" and "TEXT" in parts[:-1]:
                raise ValueError(f"{at}: any_text must be the last of a sequence, or the content of a tag")
            return self.rule(" ".join(parts) if kind == "sequence" else " | ".join(parts))
        if kind == "tag":
            return self.tag(value, at)
        if kind == "triggered_tags":
            return self.triggered(value, at)
        if kind == "tags_with_separator":
            return self.separated(value, at)
        raise ValueError(f"{at}.type {kind!r} is not a format that is supported")

    def tag(self, value: _Json, at: str, skip: int = 0) -> str:
        """A tag, whose first `skip` characters have been written already."""
        begin, content = _text(value, "begin", at), _object(value.get("content"), f"{at}.content")
        ends = value.get("end", "")
        ends = [ends] if isinstance(ends, str) else ends
        if not isinstance(ends, list) or not ends or not all(isinstance(end, str) for end in ends):
            raise ValueError(f"{at}.end must be a string or a list of strings")
        if content.get("type") == "any_text":
            body = self.rule(" | ".join(self.text_until(end) for end in ends))
        else:
            closing = [self.literal(end) or '""' for end in ends]
            body = f"{self.format(content, f'{at}.content')} {self.rule(' | '.join(closing))}"
        return self.rule(f"{self.literal(begin[skip:])} {body}")

    def triggered(self, value: _Json, at: str) -> str:
        """Text; behind a trigger, one of its tags."""
        triggers = _list(value, "triggers", at)
        tags = [_object(tag, at) for tag in _list(value, "tags", at)]
        if not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise ValueError(f"{at}.triggers must be strings that are not empty")
        behind: dict[str, list[str]] = {}
        whole: list[str] = []
        for i, tag in enumerate(tags):
            begin = _text(tag, "begin", f"{at}.tags[{i}]")
            trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
            if trigger is None:
                raise ValueError(f"{at}.tags[{i}].begin {begin!r} begins with none of the triggers")
            behind.setdefault(trigger, []).append(self.tag(tag, f"{at}.tags[{i}]", len(trigger)))
            whole.append(self.tag(tag, f"{at}.tags[{i}]"))
        found = [f"{self.text_until(trigger)} ({' | '.join(rest)})" for trigger, rest in behind.items()]
        in_text, first = self.rule(" | ".join(found)), self.rule(" | ".join(whole))
        if value.get("stop_after_first"):
            return first if value.get("at_least_one") else f"({in_text} | TEXT)"
        return f"{first} {in_text}* TEXT" if value.get("at_least_one") else f"{in_text}* TEXT"

    def separated(self, value: _Json, at: str) -> str:
        """Tags with a separator between any two, and nothing else."""
        tags = [self.tag(_object(tag, at), f"{at}.tags[{i}]") for i, tag in enumerate(_list(value, "tags", at))]
        one, separator = self.rule(" | ".join(tags)), self.literal(_text(value, "separator", at))
        several = one if value.get("stop_after_first") else f"{one} ({separator} {one})*"
        return self.rule(several) if value.get("at_least_one") else f"({several})?"

    def text_until(self, end: str) -> str:
        """Any text up to the first `end`, which is included."""
        match = self._special.match(end) if self._special else None
        if match is not None:  # a token that text cannot spell
            return self.rule(f"TEXT {self.literal(end)}")
        return self.rule(f"TEXT {self.literal(end)}", lazy=True) if end else "TEXT"

    def literal(self, text: str) -> str:
        """The text itself; special tokens in it by their ids."""
        parts, at = [], 0
        for match in self._special.finditer(text) if self._special else ():
            parts += [quoted(text[at : match.start()]), f"<[{self._ids[match[0]]}]>"]
            at = match.end()
        return " ".join(part for part in [*parts, quoted(text[at:])] if part)

    def rule(self, body: str, lazy: bool = False) -> str:
        """The name of a new rule."""
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name


def quoted(text: str) -> str:
    """A string of a Lark grammar; nothing for an empty one."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def _from_structures(tag: _Json) -> _Json:
    """The older form as a `triggered_tags` format."""
    tags = []
    for i, structure in enumerate(_list(tag, "structures", "structural_tag")):
        found = _object(structure, f"structures[{i}]")
        content = {"type": "json_schema", "json_schema": found.get("schema")}
        tags.append({"begin": found.get("begin"), "content": content, "end": found.get("end", "")})
    return {"triggers": _list(tag, "triggers", "structural_tag"), "tags": tags}


def _object(value: Any, at: str) -> _Json:
    if not isinstance(value, dict):
        raise ValueError(f"{at} must be an object")
    return value


def _list(value: _Json, field: str, at: str) -> list[Any]:
    found = value.get(field)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{at}.{field} must be a list that is not empty")
    return found


def _text(value: _Json, field: str, at: str) -> str:
    found = value.get(field)
    if not isinstance(found, str):
        raise ValueError(f"{at}.{field} must be a string")
    return found
