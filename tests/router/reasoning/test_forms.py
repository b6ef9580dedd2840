"""Forms that are demanded of models that reason first."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.common.structured_outputs import StructuredOutputsParams
from penstock.router.incremental import Steps, Text
from penstock.router.reasoning.formats import DeepSeekR1, Granite, Mistral, Qwen3
from penstock.router.reasoning.forms import after_reasoning
from penstock.router.reasoning.parser import Beginning, Marked, ReasoningParser

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
OPEN, CLOSED = Beginning("<think>\n"), Beginning("<think>\n\n</think>\n\n")


def format_of(demanded: StructuredOutputsParams, parser: ReasoningParser) -> Any:
    whole = after_reasoning(demanded, parser)
    assert whole is not None and whole.structural_tag is not None
    return json.loads(str(whole.structural_tag))["format"]


@pytest.mark.parametrize(
    ("demanded", "form"),
    [
        ({"json": SCHEMA}, {"type": "json_schema", "json_schema": SCHEMA}),
        ({"json_object": True}, {"type": "json_schema", "json_schema": {"type": "object"}}),
        ({"regex": "a+"}, {"type": "regex", "pattern": "a+"}),
        (
            {"choice": ["a", "b"]},
            {"type": "or", "elements": [{"type": "const_string", "value": text} for text in "ab"]},
        ),
        ({"structural_tag": {"format": {"type": "any_text"}}}, {"type": "any_text"}),
    ],
    ids=str,
)
def test_every_kind_comes_after_the_reasoning(demanded: dict[str, Any], form: Any) -> None:
    tag = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": ["</think>"]}
    assert format_of(StructuredOutputsParams(**demanded), Qwen3(OPEN)) == {"type": "sequence", "elements": [tag, form]}


def test_options_stay() -> None:
    whole = after_reasoning(StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True), Qwen3(OPEN))
    assert whole is not None and whole.disable_any_whitespace


def test_no_reasoning_no_change() -> None:
    demanded = StructuredOutputsParams(regex="a")
    assert after_reasoning(demanded, DeepSeekR1(CLOSED)) is demanded
    assert after_reasoning(demanded, Qwen3(Beginning(thinking=False))) is demanded


@pytest.mark.parametrize("parser", [Mistral, Granite])
def test_a_model_that_may_reason(parser: type[Marked]) -> None:
    reasoned, plain = format_of(StructuredOutputsParams(regex="a"), parser(Beginning()))["elements"]
    assert plain == {"type": "regex", "pattern": "a"} and begins_of(reasoned) == list(parser.starts)


def test_a_model_that_has_begun_to_reason_or_begins_by_itself() -> None:
    assert begins_of(format_of(StructuredOutputsParams(regex="a"), Qwen3(Beginning()))) == ["", "<think>"]


def begins_of(reasoned: Any) -> list[str]:
    """How the reasoning may begin that a form comes after."""
    reasoning, form = reasoned["elements"]
    assert form == {"type": "regex", "pattern": "a"}
    return [tag["begin"] for tag in reasoning.get("elements", [reasoning])]


class Unknown(ReasoningParser):
    names = ("unknown",)

    def parse(self, text: Text) -> Steps[None]:
        yield from text.spaces()


def test_what_cannot_be_said() -> None:
    assert after_reasoning(StructuredOutputsParams(grammar='start: "a"'), Qwen3(OPEN)) is None
    assert after_reasoning(StructuredOutputsParams(structural_tag={"triggers": ["a"]}), Qwen3(OPEN)) is None
    assert after_reasoning(StructuredOutputsParams(regex="a"), Unknown(OPEN)) is None
