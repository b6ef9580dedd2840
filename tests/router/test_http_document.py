"""docs/http.md has every field, route and limit of the router, and no other; test_known_fields.py tries the fields."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from penstock.common import bad_words, grammar, sampling
from penstock.common.config import RouterConfig
from penstock.router import chat_messages, endpoints, http_protocol, protocol, server
from penstock.router.anthropic.request import MessagesRequest
from penstock.router.known_fields import _NOWHERE
from penstock.router.openapi import OPERATIONS
from penstock.router.protocol import ChatRequest, CompletionRequest
from penstock.router.responses.request import ResponsesRequest
from penstock.router.token_routes import DetokenizeRequest, TokenizeRequest
from penstock.router.tools.request import MAX_TOOLS
from tests.router.http_document import NOWHERE, code, fields, table

BODIES: dict[str, Any] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
}


@pytest.mark.parametrize("path", BODIES)
def test_every_field_of_a_body_is_told(path: str) -> None:
    own = set(BODIES[path].__struct_fields__) - {"user"}  # which is told to say nothing
    told = fields(path)
    assert own <= told.keys()
    assert {field for field, what in told.items() if what == "honoured"} <= own


def test_what_asks_for_nothing_is_told() -> None:
    told = {
        field: [msgspec.json.decode(value) for value in code(nothing) if value not in ("null", "n")]
        for names, nothing in table(NOWHERE)
        for field in code(names)
    }
    assert told == {field: list(values) for field, values in _NOWHERE.items()} | {"best_of": [], "chat_template": []}


def test_every_route_is_told() -> None:
    told = set()
    for routes, _ in table("The HTTP surface"):
        for method, path in (each.split(" ") for each in code(routes) if " " in each):
            told.add((method.lower(), re.sub("{.*}", "{}", path)))
    served = {(operation.method, re.sub("{.*}", "{}", operation.path)) for operation in OPERATIONS}
    assert told - {("get", path) for path in ("/ui", "/openapi.json", "/docs")} == served


@pytest.mark.parametrize(("path", "body"), [("/tokenize", TokenizeRequest), ("/detokenize", DetokenizeRequest)])
def test_the_fields_of_small_routes_are_told(path: str, body: Any) -> None:
    (row,) = (what for routes, what in table("The HTTP surface") if path in routes)
    assert set(body.__struct_fields__) - {"model"} <= set(code(row))


def test_limits_are_told() -> None:
    defaults = RouterConfig()
    limits: dict[str, tuple[float, ...]] = {
        "URL and headers": (http_protocol.MAX_HEAD_BYTES >> 10,),
        "body": (endpoints.MAX_BODY_BYTES >> 20,),
        "prompts times `n`": (protocol.MAX_CHOICES,),
        "messages of a chat with the parts of their contents, and calls": (chat_messages.MAX_MESSAGES,),
        "tools": (MAX_TOOLS,),
        "`stop` / `stop_token_ids` / `cache_salt`": (
            protocol.MAX_STOP_STRINGS,
            protocol.MAX_STOP_LENGTH,
            protocol.MAX_STOP_TOKEN_IDS,
            protocol.MAX_SALT_LENGTH,
        ),
        "schema or structural tag / regular expression or grammar / all choices together": (
            grammar.MAX_SCHEMA_CHARS,
            grammar.MAX_GRAMMAR_CHARS,
            grammar.MAX_CHOICE_CHARS,
        ),
        "properties / `patternProperties` of a schema": (grammar.MAX_PROPERTIES, grammar.MAX_PATTERN_PROPERTIES),
        "`bad_words`": (sampling.MAX_BAD_WORDS, bad_words.MAX_BAD_WORD_TOKENS),
        "ids of `logit_bias` and `allowed_token_ids`, times choices": (protocol.MAX_RULE_IDS,),
        "choices in flight at a router's port": (defaults.max_inflight,),
        "requests that wait at a router's port": (defaults.max_queued, defaults.queue_timeout_s),
        "an answer of which the client takes nothing": (defaults.write_timeout_s,),
        "a request that has begun and of which nothing more comes": (server.REQUEST_S,),
        "a connection without a request": (server.KEEP_ALIVE_S,),
        "connections of a router process": (),
        "prompt": (),
        "time to first token, between tokens": (),
    }
    told = {
        what: tuple(float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", limit))
        for what, limit, _ in table("Limits")
    }
    assert told == limits
