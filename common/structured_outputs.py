"""What a client may demand of an output's form. `SamplingParams.structured_outputs`; names as in vLLM.

Exactly one kind is asked for; what a kind's text means, and whether it can be had, is common/grammar.py's to say.
"""

from __future__ import annotations

import json as json_text
from typing import Any

import msgspec

from penstock.common.plain_values import Plain, flag, make_plain, text, texts, unless_none

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
MAX_CHOICES = 10_000


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One constraint, and how freely JSON may be written.

    Raises:
        ValueError: none or several kinds, or a value that cannot be one; the message names the field.
    """

    json: str | dict[str, Any] | None = None  # a JSON schema; kept as its text
    regex: str | None = None  # the whole output matches
    choice: list[str] | None = None  # the output is one of these
    grammar: str | None = None  # Lark, or GBNF
    json_object: bool | None = None  # any JSON object
    structural_tag: str | dict[str, Any] | None = None  # free text with constrained parts; kept as its text
    disable_any_whitespace: bool = False  # JSON without any
    disable_additional_properties: bool = False  # objects that list properties have no others, unless they say so
    whitespace_pattern: str | None = None  # regular expression of what may stand between JSON's tokens

    def __post_init__(self) -> None:
        make_plain(self, _PLAIN)
        asked = [kind for kind in KINDS if getattr(self, kind) is not None]
        if self.json_object is False:
            asked.remove("json_object")
        if len(asked) != 1:
            got = ", ".join(asked) or "none"
            raise ValueError(f"structured_outputs must have exactly one of {', '.join(KINDS)}, got {got}")
        if self.choice is not None and not 0 < len(self.choice) <= MAX_CHOICES:
            raise ValueError(f"choice must be from 1 to {MAX_CHOICES} strings, got {len(self.choice)}")
        if self.choice is not None and not all(self.choice):
            raise ValueError("choice must be without empty strings")

    @property
    def kind(self) -> str:
        """Which of `KINDS` is asked for."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))


def _schema(value: Any, field: str) -> str:
    """Always as text: MessagePack's integers have 64 bits, a schema's any number."""
    if not isinstance(value, dict):
        return text(value, field)
    try:
        return text(json_text.dumps(value, ensure_ascii=False), field)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{field} must hold what JSON can: {error}") from None


_PLAIN: dict[str, Plain] = {
    **dict.fromkeys(("json", "structural_tag"), unless_none(_schema)),
    **dict.fromkeys(("regex", "grammar", "whitespace_pattern"), unless_none(text)),
    "choice": unless_none(texts),
    "json_object": unless_none(flag),
    **dict.fromkeys(("disable_any_whitespace", "disable_additional_properties"), flag),
}
