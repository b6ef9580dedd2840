"""Every field of docs/http.md (all of vLLM 0.22's) on every route that generates: honoured, or a 400 that names it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from tests.router.fake_router import Router, running
from tests.router.http_document import NOWHERE, code, fields, table
from tests.tiny_tokenizers import sentencepiece

USER = {"role": "user", "content": "a b c d"}
BEGUN = {"role": "assistant", "content": "It"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
# Shows all that a template may look at.
TEMPLATE = (
    "{{ tools }}{{ documents }}{{ reasoning_effort }}{{ custom }}{{ enable_thinking }}\n"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant:{% endif %}"
)
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "a b c d", "max_tokens": 5, "seed": 1},
    "/v1/chat/completions": {"model": "tiny", "messages": [USER, BEGUN], "max_tokens": 5, "seed": 1},
    "/v1/responses": {"model": "tiny", "input": "a b c d", "max_output_tokens": 5, "seed": 1},
    "/v1/messages": {"model": "tiny", "messages": [USER, BEGUN], "max_tokens": 5, "seed": 1},
}
# Section by section as vLLM's request classes have them: a value that asks for something, and what must go with it.
FIELDS: dict[str, Any] = {
    "model": "alias", "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {"5": 1.0}, "n": 2, "seed": 7,
    "stop": ["water"], "stream": True, "temperature": 0.5, "top_p": 0.5, "response_format": {"type": "json_object"},
    "use_beam_search": True, "top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5, "length_penalty": 2.0,
    "stop_token_ids": [9], "include_stop_str_in_output": True, "ignore_eos": True, "min_tokens": 2,
    "skip_special_tokens": False, "spaces_between_special_tokens": False, "truncate_prompt_tokens": 2,
    "truncation_side": "right", "allowed_token_ids": [5, 6], "prompt_logprobs": 1,
    "structured_outputs": {"choice": ["a"]}, "priority": 3, "request_id": "mine",
    "return_tokens_as_token_ids": True, "return_token_ids": True, "cache_salt": "x", "kv_transfer_params": {"a": 1},
    "vllm_xargs": {"a": 1}, "repetition_detection": {"max_pattern_size": 3}, "thinking_token_budget": 5,
    "prompt": "b", "prompt_embeds": "AAAA", "echo": True, "logprobs": True, "max_tokens": 3, "suffix": "x",
    "add_special_tokens": True, "messages": [USER], "top_logprobs": 1, "max_completion_tokens": 3, "tools": [TOOL],
    "tool_choice": "required", "parallel_tool_calls": False, "reasoning_effort": "high", "include_reasoning": False,
    "bad_words": ["water"], "add_generation_prompt": False, "continue_final_message": True, "documents": [{"t": "x"}],
    "chat_template": "{{ messages }}", "chat_template_kwargs": {"custom": "x"}, "media_io_kwargs": {"image": {}},
    "mm_processor_kwargs": {"a": 1}, "return_prompt_text": True, "best_of": 2,
    "stream_options": {"include_usage": True},
    "guided_json": SCHEMA, "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": 'root ::= "a"',
    "timeline": True, "guided_json_object": True, "verbosity": "low", "functions": [TOOL["function"]],
    "function_call": "auto",
    "modalities": ["audio"], "audio": {"voice": "x"}, "prediction": {"type": "content"}, "web_search_options": {"a": 1},
    "container": "x", "context_management": {"a": 1}, "generate_summary": "auto", "enable_response_messages": True,
    "logits_processors": ["a.b"], "mcp_servers": [{"a": 1}], "previous_input_messages": [{"a": 1}],
    "guided_whitespace_pattern": "[ ]?",
}  # fmt: skip
WITH: dict[str, dict[str, Any]] = {
    "truncation_side": {"truncate_prompt_tokens": 2},
    "length_penalty": {"use_beam_search": True},
    "include_stop_str_in_output": {"stop": ["water"]},
    "return_tokens_as_token_ids": {"logprobs": True},
    "top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": [TOOL]},
    "continue_final_message": {"add_generation_prompt": False},
    "stream_options": {"stream": True},
    "parallel_tool_calls": {"tools": [TOOL], "tool_choice": "required"},
    "include_reasoning": {},
    "guided_whitespace_pattern": {"guided_json": SCHEMA},
}
ALONE = {("/v1/responses", "top_logprobs")}  # where it needs nothing to go with it
OTHERWISE: dict[tuple[str, str], Any] = {  # where a route has a value of its own for a field
    ("/v1/completions", "logprobs"): 1,
    ("/v1/completions", "add_special_tokens"): False,
    ("/v1/completions", "return_tokens_as_token_ids"): True,
    ("/v1/messages", "tools"): [{"name": "f", "input_schema": SCHEMA}],
    ("/v1/messages", "tool_choice"): {"type": "any"},
    ("/v1/responses", "tools"): [{"type": "function", "name": "f", "parameters": SCHEMA}],
}
SHOWN_ELSEWHERE = {  # what no fake worker, and no tokenizer without special tokens, can show
    *((path, "length_penalty") for path in BODIES),  # tests/system/contract/test_openai_generation.py
    *((path, "add_special_tokens") for path in BODIES),  # test_special_tokens_are_added_where_told below
    ("/v1/responses", "stream_options"),  # the usage is told in any case
}


@pytest.fixture(scope="module")
def fields_router() -> Iterator[Router]:
    options = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "deepseek_r1"}
    with running(template=TEMPLATE, **options) as router:
        yield router


@pytest.fixture
def router(fields_router: Router) -> Router:
    fields_router.reset()
    return fields_router


def outcome(router: Router, path: str, body: dict[str, Any]) -> tuple[httpx.Response, tuple[Any, str]]:
    """The answer; and all that depends on the body: what was computed, and what was said, without ids and times."""
    router.reset()
    answer = router.post(path, body)
    computed = [msgspec.structs.replace(request, request_id="") for request in router.service.requests]
    said = re.sub(r'"(created|created_at|completed_at)":\d+|[0-9a-f]{32}|"ms":[\d.]+', "", answer.text)
    return answer, (computed, said)


def test_all_fields_of_the_document_are_tried() -> None:
    shared = {field for heading in ("Fields", NOWHERE) for names, *_ in table(heading) for field in code(names)}
    assert shared == FIELDS.keys()


@pytest.mark.parametrize("path", BODIES)
def test_every_field_changes_something_or_is_refused_as_the_document_says(router: Router, path: str) -> None:
    told = fields(path)
    assert {field: verdict(router, path, field) for field in FIELDS} == {field: told[field] for field in FIELDS}


def verdict(router: Router, path: str, field: str) -> str:
    needed = {} if (path, field) in ALONE else WITH.get(field, {})
    also = {name: OTHERWISE.get((path, name), given) for name, given in needed.items()}
    base = BODIES[path] | also
    if field == "max_completion_tokens" and path != "/v1/messages":  # it needs its own
        base = {name: value for name, value in base.items() if name != "max_tokens"}
    answer, with_it = outcome(router, path, base | {field: OTHERWISE.get((path, field), FIELDS[field])})
    if answer.status_code == 400:
        error = answer.json()["error"]
        named = error["message"] if path == "/v1/messages" else error["param"]
        told = any(name in named for name in (field, *also)) and with_it[0] == []
        return "refused" if told else f"refused, but not by name: {answer.text}"
    if answer.status_code != 200:
        return answer.text
    without, plain = outcome(router, path, base)
    if without.status_code != 200:
        return f"refused without it: {without.text}"
    return "honoured" if with_it != plain or (path, field) in SHOWN_ELSEWHERE else "changes nothing"


def test_special_tokens_are_added_where_told() -> None:
    """By default to a completion's prompt, and not to what a chat template has written."""
    tokenizer = sentencepiece()
    with running(tokenizer=tokenizer, template="{{ messages[0].content }}") as router:
        for path, default in (("/v1/completions", True), ("/v1/chat/completions", False)):
            text = "the water"
            given = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
            for added in (True, False, None):
                assert router.post(path, {**given, "add_special_tokens": added}).status_code == 200
                ids = tokenizer.encode(text, add_special_tokens=default if added is None else added)
                assert router.last.prompt_token_ids == ids
    assert tokenizer.encode(text, add_special_tokens=True) != tokenizer.encode(text, add_special_tokens=False)
