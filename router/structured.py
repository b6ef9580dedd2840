"""The fields by which a request demands a form of its output, and their check. Used by protocol.py and front.py.

`response_format` is OpenAI's, `structured_outputs` vLLM's, `guided_*` vLLM's older ones; all become one
`StructuredOutputsParams`. What cannot be had is refused before anything is sent: the router compiles the form itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec

from penstock.common.errors import BadRequest
from penstock.common.grammar import GrammarError, Grammars
from penstock.common.structured_outputs import StructuredOutputsParams
from penstock.common.tokenizer import Tokenizer

MAX_FORM_CHARS = 16 << 20  # of a form, times choices: each choice has its own
_GUIDED = ("json", "regex", "choice", "grammar", "json_object")


class JsonSchemaFormat(msgspec.Struct):
    """`response_format.json_schema`; an output always follows its schema, `strict` or not."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """OpenAI's `response_format`, with vLLM's structural tags in both their writings."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None

    def form(self) -> StructuredOutputsParams | None:
        """What it demands; None: nothing.

        Raises:
            BadRequest: a kind that is not known, or one without what it needs.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema is None:
                field = "response_format.json_schema.schema"
                raise BadRequest(f"{field} is required", param=field)
            return StructuredOutputsParams(json=self.json_schema.schema)
        if self.type == "structural_tag":
            parts = {"format": self.format, "structures": self.structures, "triggers": self.triggers}
            return StructuredOutputsParams(structural_tag={k: v for k, v in parts.items() if v is not None})
        kinds = "text, json_object, json_schema or structural_tag"
        raise BadRequest(f"response_format.type must be {kinds}, got {self.type!r}", param="response_format.type")


class FormFields(msgspec.Struct, kw_only=True):
    """The fields of a body; after `take_form` all of them are `structured_outputs`."""

    structured_outputs: StructuredOutputsParams | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None

    @property
    def form_field(self) -> str:
        """The field that demands the form."""
        if self.response_format is not None and self.response_format.type != "text":
            return "response_format"
        guided = (f"guided_{kind}" for kind in _GUIDED)
        return next((field for field in guided if getattr(self, field) is not None), "structured_outputs")

    def take_form(self) -> None:
        """Make one form of all fields.

        Raises:
            BadRequest: several fields demand one, or a field is wrong.
        """
        found = None if self.response_format is None else self.response_format.form()
        if found is not None:
            self.constrain(found, "response_format")
        guided: dict[str, Any] = {kind: getattr(self, f"guided_{kind}") for kind in _GUIDED}
        guided = {kind: value for kind, value in guided.items() if value is not None and value is not False}
        if guided:
            try:
                form = StructuredOutputsParams(**guided, whitespace_pattern=self.guided_whitespace_pattern)
            except ValueError as error:
                raise BadRequest(f"guided_{error}", param=f"guided_{next(iter(guided))}") from error
            self.constrain(form, f"guided_{next(iter(guided))}")

    def constrain(self, constraint: StructuredOutputsParams, field: str) -> None:
        """Have the output take the form that `field` asks for.

        Raises:
            BadRequest: another field has asked for a form already.
        """
        if self.structured_outputs is not None:
            raise BadRequest(f"{field} does not go with another field that constrains the output", param=field)
        self.structured_outputs = constraint

    def check_form_size(self, choices: int) -> None:
        """Raise BadRequest for a form that is too large to be sent with each of so many choices."""
        form = self.structured_outputs
        if form is not None and choices > 1 and len(msgspec.msgpack.encode(form)) * choices > MAX_FORM_CHARS:
            field = self.form_field
            raise BadRequest(f"{field}: characters times choices must be at most {MAX_FORM_CHARS}", param=field)


class Forms:
    """Compiles the forms that are asked for, in a thread, and remembers the latest: is there such an output?

    The tokenizer's vocabulary will do for that: a model's has more tokens at most, which stand for no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._grammars = Grammars(lambda: tokenizer, tokenizer.vocab_size, end, masks=False)

    async def prepare(self) -> None:
        """Prepare the vocabulary, before there are streams that would stand still meanwhile."""
        with contextlib.suppress(GrammarError):  # whoever demands a form will be told
            await asyncio.wrap_future(self._grammars.prepare())

    async def check(self, form: StructuredOutputsParams, field: str) -> None:
        """Return if the workers can follow the form.

        Raises:
            BadRequest: they cannot; the message names the field, and the keyword of a schema.
        """
        compiled = asyncio.wrap_future(self._grammars.compile(form))
        try:
            await asyncio.shield(compiled)  # others may wait for the same form
        except GrammarError as error:
            raise BadRequest(f"{field}: {error}", param=field) from error

    def close(self) -> None:
        """End the thread."""
        self._grammars.close()
