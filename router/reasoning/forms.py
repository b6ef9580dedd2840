"""Outputs of a demanded form, by a model that reasons first: the form is for what follows the reasoning."""

from __future__ import annotations

import json
from typing import Any

from penstock.common.structured_outputs import StructuredOutputsParams
from penstock.router.reasoning.parser import ReasoningParser


def after_reasoning(demanded: StructuredOutputsParams, parser: ReasoningParser) -> StructuredOutputsParams | None:
    """The form of the whole output, reasoning included; None if that cannot be said: then there is no reasoning."""
    form = _format(demanded)
    whole = None if form is None else parser.before(form)
    if whole is None or whole is form:
        return None if whole is None else demanded
    return StructuredOutputsParams(
        structural_tag={"format": whole},
        disable_any_whitespace=demanded.disable_any_whitespace,
        disable_additional_properties=demanded.disable_additional_properties,
        whitespace_pattern=demanded.whitespace_pattern,
    )


def _format(demanded: StructuredOutputsParams) -> dict[str, Any] | None:
    """A form as a format of structural tags (common/structural_tag.py)."""
    kind = demanded.kind
    if kind == "json_object":
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if kind == "json":
        return {"type": "json_schema", "json_schema": json.loads(str(demanded.json))}
    if kind == "regex":
        return {"type": "regex", "pattern": demanded.regex}
    if kind == "choice":
        return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in demanded.choice or ()]}
    if kind == "structural_tag":
        format = json.loads(str(demanded.structural_tag)).get("format")
        return format if isinstance(format, dict) else None
    return None  # a whole grammar has no place in another one
