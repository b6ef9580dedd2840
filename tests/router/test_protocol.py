"""Wrong bodies: every one is a 400 that names the field, none a 422 or 500."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.common.bus import MAX_MESSAGE_BYTES
from penstock.common.tokenizer import Tokenizer
from penstock.router.endpoints import MAX_BODY_BYTES
from tests.router.fake_router import CONTEXT, VOCAB, Router, running
from tests.tiny_tokenizers import SETTINGS, byte_level, byte_level_backend

CHAT = {"messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"prompt": "a"}
WRONG = [
    ("temperature", "hot"), ("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -2), ("top_k", 1.5),
    ("min_p", 2), ("n", 0), ("n", 10**6), ("n", "1"), ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", "x"),
    ("max_completion_tokens", 0), ("seed", 2**63), ("seed", 0.5), ("presence_penalty", 3), ("frequency_penalty", -3),
    ("repetition_penalty", 0), ("min_tokens", -1), ("min_tokens", 10**9), ("stop", ""), ("stop", ["a"] * 65),
    ("stop", "x" * 2000), ("stop", 5), ("stop_token_ids", [VOCAB]), ("stop_token_ids", [-1]), ("ignore_eos", 1),
    ("stream", "yes"), ("stream_options", {"include_usage": True}), ("cache_salt", ""), ("cache_salt", 1),
    ("cache_salt", "x" * 257), ("request_id", ""), ("request_id", "a\nb"), ("stop_token_ids", list(range(1025))),
    ("best_of", 0), ("model", 5), ("logit_bias", {"a": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {str(VOCAB): 1}),
    ("logit_bias", [1]), ("logit_bias", {"1": "x"}), ("allowed_token_ids", []), ("allowed_token_ids", [VOCAB]),
    ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2), ("truncate_prompt_tokens", CONTEXT + 1),
    ("use_beam_search", "yes"), ("length_penalty", "long"),
    ("truncation_side", "up"), ("priority", "high"), ("priority", 2**31), ("prompt_logprobs", -1),
    ("prompt_logprobs", 21), ("allowed_token_ids", [-1]), ("bad_words", "a"), ("bad_words", [""]), ("bad_words", [" "]),
    ("response_format", {}), ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}), ("structured_outputs", {}),
    ("structured_outputs", {"regex": "a", "choice": ["b"]}), ("structured_outputs", {"regex": "(a"}),
    ("structured_outputs", {"json": {"not": {}}}), ("structured_outputs", {"json": "nope"}),
    ("structured_outputs", {"choice": []}), ("structured_outputs", {"json_object": False}),
    ("structured_outputs", {"grammar": "start: b"}), ("structured_outputs", {"grammar": "start: start"}),
    ("response_format", {"type": "structural_tag", "structures": [], "triggers": ["a"]}),
    ("response_format", {"type": "structural_tag", "format": {"type": "nothing"}}),
    ("guided_json", "{"), ("guided_regex", "a{,3}"), ("guided_choice", [""]), ("guided_grammar", "root ::= b"),
    ("structured_outputs", {"regex": "a" * 40_000}), ("guided_json", {"description": "x" * 130_000}),
    ("bad_words", ["a"] * 129), ("bad_words", ["x" * 1025]), ("bad_words", ["0 1 2 3 4 5 6 7 8 9" * 4]),
]  # fmt: skip
UNSUPPORTED: list[tuple[str, Any]] = [
    ("prompt_embeds", "x"),
    ("best_of", 2), ("kv_transfer_params", {"a": 1}),
    ("suffix", "x"),
    ("modalities", ["audio"]), ("audio", {"voice": "x"}), ("functions", [{}]),
]  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "logit_bias": {}, "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "use_beam_search": False,
    "bad_words": [], "prompt_logprobs": None, "best_of": 1, "suffix": None, "modalities": ["text"], "priority": 0,
    "parallel_tool_calls": True, "service_tier": "auto", "store": False, "metadata": {}, "x": 1,
}  # fmt: skip


def error_of(router: Router, path: str, body: Any) -> dict[str, Any]:
    response = router.post(path, body)
    assert response.status_code == 400, (response.status_code, response.text)
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_wrong_values_are_named(router: Router, path: str, body: dict[str, Any]) -> None:
    for field, value in WRONG:
        error = error_of(router, path, body | {field: value})
        assert error["param"] is not None and error["param"].startswith(field), (field, value, error)
        assert field in error["message"]
    assert router.service.requests == []


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_features_to_come_are_named(router: Router, path: str, body: dict[str, Any]) -> None:
    for field, value in UNSUPPORTED:
        error = error_of(router, path, body | {field: value})
        assert error["param"] == field and "not supported yet" in error["message"]
    assert router.post(path, body | NEUTRAL).status_code == 200


@pytest.mark.parametrize(
    "prompt",
    [None, "", [], [""], [[]], [[1], []], {"a": 1}, [1, "a"], [1.5], [-1], [VOCAB], [[VOCAB]], 5, [[["a"]]]],
    ids=repr,
)
def test_wrong_prompts(router: Router, prompt: Any) -> None:
    assert error_of(router, "/v1/completions", {"prompt": prompt})["param"] == "prompt"


def test_completion_only_fields(router: Router) -> None:
    assert error_of(router, "/v1/completions", {})["param"] == "prompt"
    assert error_of(router, "/v1/completions", COMPLETION | {"logprobs": 21})["param"] == "logprobs"
    assert error_of(router, "/v1/completions", COMPLETION | {"logprobs": -1})["param"] == "logprobs"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
    ids=str,
)
def test_wrong_chat_fields(router: Router, fields: dict[str, Any], param: str) -> None:
    assert error_of(router, "/v1/chat/completions", CHAT | fields)["param"] == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[0].content[0]"),
        ({"role": "assistant", "content": None, "function_call": {"name": "x"}}, "messages[0].function_call"),
    ],
    ids=str,
)
def test_parts_to_come_are_named(router: Router, message: dict[str, Any], param: str) -> None:
    error = error_of(router, "/v1/chat/completions", {"messages": [message]})
    assert error["param"] == param and "not supported yet" in error["message"]


def test_chat_only_fields_to_come(router: Router) -> None:
    for field, value in (("chat_template", "{{ 1 }}"), ("return_prompt_text", True)):
        error = error_of(router, "/v1/chat/completions", CHAT | {field: value})
        assert error["param"] == field and "not supported yet" in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"nul", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 10**5]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bodies_that_are_no_object(router: Router, path: str, body: bytes) -> None:
    response = router.http.post(path, content=body)
    assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [b'"\xff\xfe"', b'["a", "\xff"]'])
def test_a_prompt_that_is_not_utf8(router: Router, prompt: bytes) -> None:
    response = router.http.post("/v1/completions", content=b'{"prompt":' + prompt + b"}")
    assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"
    response = router.http.post("/v1/chat/completions", content=b'{"messages":[{"role":"user","content":"\xff"}]}')
    assert response.status_code == 400


def test_the_limits_themselves_are_allowed(router: Router) -> None:
    ids = [VOCAB - 1, *range(10)]
    assert router.post("/v1/completions", COMPLETION | {"cache_salt": "é" * 256}).status_code == 200
    assert router.post("/v1/completions", COMPLETION | {"stop_token_ids": ids * 1000}).status_code == 200
    assert router.last.sampling.stop_token_ids == ids, "repeated ones count once"


def test_tokens_of_a_text_that_the_model_lacks_reach_no_worker() -> None:
    """Special tokens are sometimes added to a tokenizer alone: who writes one would bring down every worker in turn."""
    backend = tokenizers.Tokenizer.from_str(byte_level_backend().to_str())
    backend.add_special_tokens([f"<pad {i}>" for i in range(VOCAB)])
    with running(tokenizer=Tokenizer(backend, SETTINGS)) as router:
        for text in (f"<pad {VOCAB - 1}>", f"a<pad {VOCAB - 1}>b"):
            for path, body in (
                ("/v1/completions", {"prompt": ["a", text]}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
            ):
                error = error_of(router, path, body)
                assert error["param"] in body and "the model lacks" in error["message"]
        assert router.post("/v1/completions", {"prompt": "<pad 0>"}).status_code == 200


def test_a_body_that_is_taken_fits_the_bus(router: Router) -> None:
    assert MAX_BODY_BYTES < MAX_MESSAGE_BYTES
    body = b'{"prompt":"a","user":"%b"}'
    assert router.http.post("/v1/completions", content=body % (b"x" * (MAX_BODY_BYTES - len(body) + 2))).is_success
    response = router.http.post("/v1/completions", content=body % (b"x" * MAX_BODY_BYTES))
    assert response.status_code == 400 and str(MAX_BODY_BYTES) in response.json()["error"]["message"]


@pytest.fixture
def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("this request had to be refused before")

    monkeypatch.setattr(Tokenizer, "encode", encode)


@pytest.mark.usefixtures("no_tokenising")
def test_too_many_choices_are_refused_before_tokenising(router: Router) -> None:
    for prompts, n, param in ((1025, 1, "prompt"), (400, 3, "n"), (1, 1025, "n")):
        error = error_of(router, "/v1/completions", {"prompt": ["a"] * prompts, "n": n})
        assert error["param"] == param
        assert "at most 1024" in error["message"] and f"{prompts} prompts and n={n}" in error["message"]
    assert error_of(router, "/v1/chat/completions", CHAT | {"n": 1025})["param"] == "n"


@pytest.mark.usefixtures("no_tokenising")
def test_prompts_that_cannot_fit_are_refused_before_any_work(router: Router) -> None:
    most = CONTEXT * byte_level().longest_token_chars
    text = "a" * (most + 1)
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": ["a", text]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        error = error_of(router, path, body)
        assert error["code"] == "context_length_exceeded" and error["param"] == next(iter(body))
        message = error["message"]
        assert f"maximum context length is {CONTEXT} tokens" in message and "characters cannot fit" in message
    error = error_of(router, "/v1/completions", {"prompt": [-1] * (CONTEXT + 1)})
    assert error["code"] == "context_length_exceeded", "the length is looked at before the ids"
    assert f"{CONTEXT + 1} tokens cannot fit" in error["message"]


def test_a_wrong_content_type_does_not_matter(router: Router) -> None:
    response = router.http.post("/v1/completions", content=b'{"prompt":"a"}', headers={"content-type": "text/plain"})
    assert response.status_code == 200


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3),
    ),
    max_leaves=8,
)
FIELDS = sorted(
    {field for field, _ in WRONG + UNSUPPORTED}
    | {"prompt", "messages", "logprobs", "top_logprobs", "echo", "add_special_tokens", "chat_template_kwargs", "user"}
    | {"tools", "tool_choice", "documents", "reasoning_effort", "include_reasoning"}
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(body=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), chat=st.booleans())
def test_any_body_is_answered_or_refused(router: Router, body: dict[str, Any], chat: bool) -> None:
    path, base = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", COMPLETION)
    response = router.post(path, {**base, "max_tokens": 4, **body})
    assert response.status_code in (200, 400, 404), (response.status_code, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("echo", True), ("prompt_logprobs", 1), ("logit_bias", {"1": 1}), ("bad_words", ["a"]),
        ("repetition_penalty", 1.1), ("presence_penalty", 0.5), ("min_tokens", 2), ("stop_token_ids", [3]), ("n", 65),
        ("length_penalty", 101.0),
    ],
)  # fmt: skip
def test_what_does_not_go_with_beam_search_is_named(router: Router, field: str, value: Any) -> None:
    error = error_of(router, "/v1/completions", COMPLETION | {"use_beam_search": True, field: value})
    assert error["param"] == field and field in error["message"]
