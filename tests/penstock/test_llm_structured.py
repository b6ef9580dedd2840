"""`LLM` with outputs that take a form, as vLLM's users write it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import LLM
from penstock.sampling_params import SamplingParams, StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["n"]}


@pytest.fixture(scope="module")
def llm(checkpoints: dict[str, Path]) -> Iterator[LLM]:
    made = LLM(str(checkpoints["llama"]), device="cpu", cpu_threads=1, kv_cache_memory_bytes=4 << 20, max_model_len=512)
    yield made
    made.close()


def test_choices_and_schemas(llm: LLM) -> None:
    choice = StructuredOutputsParams(choice=["Positive", "Negative"])
    closed = StructuredOutputsParams(json=SCHEMA, disable_additional_properties=True, disable_any_whitespace=True)
    params = [
        SamplingParams(structured_outputs=choice, n=3, seed=1),
        SamplingParams(structured_outputs=closed, max_tokens=40, logprobs=1),
        SamplingParams(max_tokens=5, ignore_eos=True),
    ]
    chosen, written, free = llm.generate(["Is it?", "How many?", "Well,"], params, use_tqdm=False)
    assert all(output.text in ("Positive", "Negative") for output in chosen.outputs)
    assert 0 <= json.loads(written.outputs[0].text)["n"] <= 99
    assert len(written.outputs[0].logprobs or []) == len(written.outputs[0].token_ids)
    assert len(free.outputs[0].token_ids) == 5
    assert {o.finish_reason for o in (*chosen.outputs, *written.outputs)} == {"stop"}


def test_a_form_that_cannot_be_had_is_a_value_error(llm: LLM) -> None:
    with pytest.raises(ValueError, match="uniqueItems"):
        llm.generate("a", SamplingParams(structured_outputs=StructuredOutputsParams(json={"uniqueItems": True})))
    assert not llm.engine.has_work()
