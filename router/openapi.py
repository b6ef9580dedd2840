"""/openapi.json: every route with its body, its answers and its errors, from the structs that the code decodes with.

tests/router/test_openapi.py compares this with the routes there are and with what they answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from penstock.common.version import __version__
from penstock.router import answer_schemas as answers
from penstock.router.anthropic.request import MessagesRequest, PromptRequest
from penstock.router.protocol import ChatRequest, CompletionRequest
from penstock.router.responses.request import ResponsesRequest
from penstock.router.token_routes import DetokenizeRequest, TokenizeRequest

GUARDED = ("/v1/", "/invocations/", "/tokenize/", "/detokenize/", "/fleet/")  # need a key, where there are keys

_REF = "#/components/schemas/{name}"
_RETRIED = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
_ERRORS = {
    400: "the request is wrong: `param` names the field",
    404: "no such model, response or route",
    429: "refused before any work, because a limit is reached",
    500: "a fault of the server's",
    503: "no worker can take it now, it waited too long, or Redis is away where responses are looked up",
    504: "no progress in time",
}


class Operation(NamedTuple):
    """One method of one path. `events`: what a stream's events are, where there are streams."""

    method: str
    path: str
    summary: str
    answer: Any  # a type, or several; or the media type of text
    body: Any = None  # a type, or several
    events: str = ""
    query: tuple[tuple[str, str], ...] = ()  # (name, type)
    required: tuple[str, ...] = ()  # fields that the struct cannot demand by itself
    errors: tuple[int, ...] = (400, 429, 500, 503, 504)


_LOOK_UP = (400, 404, 500, 503)
_RESPONSE = "/v1/responses/{response_id}"
OPERATIONS = (
    Operation(
        "post", "/v1/completions", "Complete a prompt", answers.Completion, CompletionRequest,
        "chunks of the answer, then [DONE]", required=("prompt",), errors=tuple(_ERRORS),
    ),
    Operation(
        "post", "/v1/chat/completions", "Answer a conversation", answers.ChatCompletion, ChatRequest,
        "chunks of the answer, then [DONE]", required=("messages",), errors=tuple(_ERRORS),
    ),
    Operation(
        "post", "/v1/responses", "Make a response", answers.ResponseObject, ResponsesRequest,
        "response.created … response.completed", errors=tuple(_ERRORS),
    ),
    Operation(
        "get", _RESPONSE, "Read a response, or its events again", answers.ResponseObject, None,
        "response.created … response.completed", (("stream", "boolean"), ("starting_after", "integer")),
        errors=_LOOK_UP,
    ),
    Operation("delete", _RESPONSE, "Delete a response", answers.DeletedResponse, errors=(404, 500, 503)),
    Operation("post", f"{_RESPONSE}/cancel", "Cancel a response", answers.ResponseObject, errors=_LOOK_UP),
    Operation(
        "post", "/v1/messages", "Make a message", answers.MessageObject, MessagesRequest,
        "message_start … message_stop", errors=tuple(_ERRORS),
    ),
    Operation(
        "post", "/v1/messages/count_tokens", "Count a message's input tokens", answers.TokenCount, PromptRequest,
        errors=(400, 404, 500, 503),
    ),
    Operation(
        "post", "/invocations", "SageMaker's name: a chat if there are messages, else a completion",
        (answers.Completion, answers.ChatCompletion), (CompletionRequest, ChatRequest),
        "chunks of the answer, then [DONE]", errors=tuple(_ERRORS),
    ),
    Operation(
        "post", "/tokenize", "Token ids of a prompt or of a conversation", answers.Tokenized, TokenizeRequest,
        errors=(400, 404, 500, 503),
    ),
    Operation(
        "post", "/detokenize", "The text of token ids", answers.Detokenized, DetokenizeRequest,
        errors=(400, 404, 500, 503),
    ),
    Operation("get", "/v1/models", "The names under which the model is served", answers.ModelList, errors=()),
    Operation("get", "/v1/models/{name}", "One of them", answers.ModelCard, errors=(404,)),
    Operation("get", "/health", "Whether requests can be served", answers.Health, errors=()),
    Operation("get", "/ping", "SageMaker's name for /health", answers.Health, errors=()),
    Operation("post", "/ping", "SageMaker's name for /health", answers.Health, errors=()),
    Operation("get", "/version", "The server's version", answers.Version, errors=()),
    Operation("get", "/load", "Choices in flight", answers.Load, errors=()),
    Operation("get", "/metrics", "Prometheus metrics", "text/plain", errors=()),
    Operation("get", "/fleet", "The live workers and their load", answers.FleetView, errors=()),
)  # fmt: skip


def openapi_document(keys: bool) -> dict[str, Any]:
    """The whole document; `keys`: this router asks for one."""
    types = [answers.ErrorBody, answers.AnthropicErrorBody, answers.Unhealthy]
    for operation in OPERATIONS:
        types += [*_types(operation.answer), *_types(operation.body)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        if operation.required:  # of one body
            components[operation.body.__name__].setdefault("required", []).extend(operation.required)
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, by_type, keys)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": __version__},
        "paths": paths,
        "components": {"schemas": components} | ({"securitySchemes": schemes} if keys else {}),
    }


def _types(given: Any) -> tuple[Any, ...]:
    """The types of a body or an answer; text has none."""
    if given is None or isinstance(given, str):
        return ()
    return given if isinstance(given, tuple) else (given,)


def _schema(given: Any, schemas: dict[Any, Any]) -> dict[str, Any]:
    found = [schemas[each] for each in _types(given)]
    return found[0] if len(found) == 1 else {"anyOf": found}


def _operation(operation: Operation, schemas: dict[Any, Any], keys: bool) -> dict[str, Any]:
    messages = operation.path.startswith("/v1/messages")
    error = schemas[answers.AnthropicErrorBody if messages else answers.ErrorBody]
    text = isinstance(operation.answer, str)
    kind, answer = (
        (operation.answer, {"type": "string"}) if text else ("application/json", _schema(operation.answer, schemas))
    )
    content = {kind: {"schema": answer}}
    if operation.events:
        events = {"type": "string", "description": f"server-sent events: {operation.events}"}
        content["text/event-stream"] = {"schema": events}
    told: dict[str, Any] = {"200": {"description": "the answer", "content": content}}
    guarded = keys and (operation.path + "/").startswith(GUARDED)
    wrong = {code: _ERRORS[code] for code in operation.errors} | ({401: "no key, or a wrong one"} if guarded else {})
    for code, description in sorted(wrong.items()):
        told[str(code)] = {"description": description, "content": {"application/json": {"schema": error}}}
        if code in (429, 503):
            told[str(code)]["headers"] = _RETRIED
    if operation.answer is answers.Health:
        unhealthy = {"application/json": {"schema": schemas[answers.Unhealthy]}}
        told["503"] = {"description": "they cannot", "content": unhealthy}
    described: dict[str, Any] = {"summary": operation.summary, "operationId": _name(operation), "responses": told}
    if parameters := _parameters(operation):
        described["parameters"] = parameters
    if operation.body is not None:
        body = {"application/json": {"schema": _schema(operation.body, schemas)}}
        described["requestBody"] = {"required": True, "content": body}
    if guarded:
        described["security"] = [{"bearer": []}, {"x-api-key": []}]
    return described


def _parameters(operation: Operation) -> Sequence[dict[str, Any]]:
    named = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    found = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in named]
    return found + [{"name": name, "in": "query", "schema": {"type": kind}} for name, kind in operation.query]


def _name(operation: Operation) -> str:
    words = operation.path.replace("{", "").replace("}", "").removeprefix("/v1").strip("/").replace("/", "_")
    return f"{operation.method}_{words}"
