"""Forms of outputs by every field that asks for one, and vLLM's small routes: over real fleets, one-phase and 1 + 1."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import tokenizers

from tests.schemas import validate
from tests.system.openai_servers import CONTEXT, GREEDY, MESSAGES, MESSAGES_AS_TEXT, TEXT, Reference, Server

pytestmark = pytest.mark.system

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
OBJECT = re.compile(r"\{.*\}", re.DOTALL)
ONE_KEY = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<n>", "schema": {"type": "integer", "minimum": 0, "maximum": 9}, "end": "</n>"}],
    "triggers": ["<n>"],
}
COMPACT = {"disable_any_whitespace": True}
FORMS: dict[str, tuple[dict[str, Any], re.Pattern[str]]] = {
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, re.compile("yes|no")),
    "regex": ({"structured_outputs": {"regex": r"[a-c]{3}-\d{2}"}}, re.compile(r"[a-c]{3}-[0-9]{2}")),
    "grammar": ({"structured_outputs": {"grammar": 'start: "a" /[0-9]{2}/ "b"'}}, re.compile("a[0-9]{2}b")),
    "gbnf": ({"guided_grammar": 'root ::= "x" [0-9] "y"'}, re.compile("x[0-9]y")),
    "json": ({"structured_outputs": {"json": SCHEMA, **COMPACT}}, OBJECT),
    "json_schema": ({"response_format": ONE_KEY}, OBJECT),
    "json_object": ({"structured_outputs": {"json_object": True, **COMPACT}, "max_tokens": 40}, re.compile(r"\{.*")),
    "structural_tag": (
        {"response_format": TAG, "stop": ["</n>"], "include_stop_str_in_output": True, "max_tokens": 40},
        re.compile(r"((?!<n>).)*(<n>\d(</n>)?)?.*", re.DOTALL),
    ),
}


def said(server: Server, path: str, body: dict[str, Any]) -> tuple[str, str]:
    """(text, why it ended) of a whole or a streamed answer."""
    given = server.http.post(path, json={"model": "tiny", **body})
    assert given.status_code == 200, given.text
    if not body.get("stream"):
        choice = given.json()["choices"][0]
        return choice["message"]["content"] if "message" in choice else choice["text"], choice["finish_reason"]
    text = reason = ""
    for line in given.text.split("\n\n"):
        data = line.removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        [choice] = json.loads(data)["choices"]
        text += (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
        reason = choice["finish_reason"] or reason
    return text, reason


@pytest.mark.parametrize("kind", FORMS)
def test_every_kind_of_form(server: Server, kind: str) -> None:
    fields, pattern = FORMS[kind]
    for path, prompt in (("/v1/completions", {"prompt": TEXT}), ("/v1/chat/completions", {"messages": MESSAGES})):
        body = {**prompt, "seed": 3, "temperature": 1.0, "max_tokens": 80, **fields}
        text, reason = said(server, path, body)
        assert said(server, path, {**body, "stream": True}) == (text, reason)
        assert pattern.fullmatch(text) if reason == "stop" else pattern.match(text), (text, reason)
        if kind in ("json", "json_schema") and reason == "stop":
            validate(SCHEMA, text)
        assert reason == "stop" or kind not in ("choice", "regex", "grammar", "gbnf")


def test_logprobs_under_a_form_are_the_models_own(
    server: Server, tokenizer: tokenizers.Tokenizer, reference: Reference
) -> None:
    """Not those of the few tokens that the form leaves, as in vLLM: docs/http.md says so."""
    fields = {"structured_outputs": {"regex": "[a-c]{6}"}, "logprobs": 1, "seed": 3, "return_token_ids": True}
    answer = server.http.post("/v1/completions", json={"model": "tiny", "prompt": TEXT, **fields}).json()
    [choice] = answer["choices"]
    rows = reference.scores(tokenizer.encode(TEXT).ids, choice["token_ids"])
    own = [row[token].item() for row, token in zip(rows, choice["token_ids"], strict=True)]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(own, abs=1e-4)
    assert min(own) < -3.0, "tokens that the model would not have chosen"


def test_schemas_of_the_other_routes(server: Server) -> None:
    """Each in the words of its API; greedy, so that all say the same as a chat."""
    user = {"role": "user", "content": "Why does it fill?"}
    common = {"model": "tiny", "temperature": 0}
    text, _ = said(
        server, "/v1/chat/completions", {"messages": [user], "max_tokens": 80, **common, "response_format": ONE_KEY}
    )
    format = {"type": "json_schema", "name": "answer", "schema": SCHEMA}
    response = server.http.post(
        "/v1/responses", json={**common, "input": user["content"], "max_output_tokens": 80, "text": {"format": format}}
    ).json()
    assert response["output"][0]["content"][0]["text"] == text
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = server.http.post(
        "/v1/messages", json={**common, "messages": [user], "max_tokens": 80, "output_config": config}
    ).json()
    assert message["content"][0]["text"] == text
    refused = server.http.post(
        "/v1/responses",
        json={**common, "input": "a", "text": {"format": {**format, "schema": {"type": "object", "not": {}}}}},
    )
    assert refused.status_code == 400 and "not" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_truncated_prompts(server: Server, tokenizer: tokenizers.Tokenizer, stream: bool) -> None:
    ids = tokenizer.encode(TEXT).ids
    for kept, side in ((5, None), (5, "right"), (-1, None)):
        part = ids[-5:] if side is None else ids[:5]
        fields = {"truncate_prompt_tokens": kept, "stream": stream, "max_tokens": 6, "temperature": 0}
        fields |= {} if side is None else {"truncation_side": side}
        whole = said(
            server, "/v1/completions", {"prompt": ids if kept == -1 else part, "max_tokens": 6, "temperature": 0}
        )
        assert said(server, "/v1/completions", {"prompt": ids, **fields}) == whole
    long = {"prompt": ids * 20, "truncate_prompt_tokens": -1, "stream": stream, "max_tokens": 6, "temperature": 0}
    part = (ids * 20)[-(CONTEXT - 6) :]
    assert said(server, "/v1/completions", long) == said(
        server, "/v1/completions", {"prompt": part, "max_tokens": 6, "temperature": 0}
    )


def test_tokens_of_texts_and_chats(server: Server, tokenizer: tokenizers.Tokenizer) -> None:
    found = server.http.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True}).json()
    ids = tokenizer.encode(TEXT).ids
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), CONTEXT)
    assert found["token_strs"] == tokenizer.encode(TEXT).tokens
    chat = server.http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert chat == tokenizer.encode(MESSAGES_AS_TEXT, add_special_tokens=False).ids
    back = server.http.post("/detokenize", json={"tokens": chat}).json()["prompt"]
    assert back == MESSAGES_AS_TEXT


def test_models_load_and_sagemakers_names(server: Server) -> None:
    [card] = server.http.get("/v1/models").json()["data"][:1]
    assert server.http.get(f"/v1/models/{card['id']}").json() == card and card["max_model_len"] == CONTEXT
    assert server.http.get("/v1/models/none").status_code == 404
    assert server.http.get("/load").json() == {"server_load": 0}
    assert server.http.get("/ping").json() == server.http.post("/ping").json() == server.http.get("/health").json()
    for path, body in (("/v1/completions", {"prompt": TEXT}), ("/v1/chat/completions", {"messages": MESSAGES})):
        for stream in (False, True):
            fields = {**body, **GREEDY, "stream": stream}
            assert said(server, "/invocations", fields) == said(server, path, fields)
