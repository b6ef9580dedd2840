"""/openapi.json against the routes there are, and against what they answer."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest
from starlette.routing import Route

from penstock.common.errors import InternalError, Overloaded, QueueTimeout, Timeout, Unavailable
from penstock.router import answer_schemas as answers
from penstock.router.app import create_app
from penstock.router.docs_page import docs_page
from penstock.router.openapi import OPERATIONS, Operation, openapi_document
from tests.router.fake_router import NO_REDIS, FakeService, Router, running
from tests.tiny_tokenizers import byte_level

USER = {"role": "user", "content": "Hello?"}
OUR_PAGES = {"/", "/ui", "/docs", "/redoc", "/openapi.json"}


def test_every_route_is_there_and_no_other() -> None:
    from penstock.common.config import RouterConfig

    app = create_app(FakeService(), RouterConfig(model="/m", redis_url=NO_REDIS), byte_level())  # type: ignore[arg-type]
    served = {
        (method.lower(), re.sub(r":\w+}", "}", route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or ())
        if route.path not in OUR_PAGES and method != "HEAD"
    }
    assert {(operation.method, operation.path) for operation in OPERATIONS} == served


def test_references_lead_somewhere(router: Router) -> None:
    document = router.http.get("/openapi.json").json()
    assert document == msgspec.json.decode(msgspec.json.encode(openapi_document(False)))
    schemas = document["components"]["schemas"]
    referenced = set(re.findall(r'"#/components/schemas/([^"]+)"', msgspec.json.encode(document).decode()))
    assert referenced <= schemas.keys() and {"ChatRequest", "ErrorBody", "MessagesRequest"} <= referenced
    assert "messages" in schemas["ChatRequest"]["required"] and "prompt" in schemas["CompletionRequest"]["required"]
    names = [o["operationId"] for path in document["paths"].values() for o in path.values()]
    assert len(names) == len(set(names))


class Page(HTMLParser):
    """What a page shows and refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            assert tag not in ("script", "link", "img", "iframe") and not name.startswith("on")
            if name in ("href", "src"):
                self.references.append(value or "")
            elif name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_from_elsewhere(router: Router) -> None:
    response = router.http.get("/docs")
    assert response.status_code == 200 and "default-src 'none'" in response.headers["content-security-policy"]
    page = Page(response.text)
    assert not page.open and "url(" not in response.text and "@import" not in response.text
    assert len(page.ids) == len(set(page.ids))
    pages = [reference for reference in page.references if not reference.startswith("#")]
    assert pages and all(router.http.get(f"/{reference}").status_code == 200 for reference in pages)
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)
    document = openapi_document(False)
    for operation in OPERATIONS:
        assert f"{operation.method.upper()} {operation.path} {operation.summary}" in page.text
    fields = {field for schema in document["components"]["schemas"].values() for field in schema.get("properties", {})}
    assert all(field in page.text for field in fields)
    assert router.http.get("/redoc", follow_redirects=True).text == response.text


def test_the_page_escapes_what_it_shows() -> None:
    forged = "<script>alert(1)</script>"
    shown = {"summary": forged, "operationId": "a", "responses": {"200": {"description": forged, "content": {}}}}
    schema = {"description": forged, "properties": {forged: {"enum": [forged], "default": forged}}}
    info = {"title": forged, "version": forged}
    document = {"info": info, "paths": {forged: {"get": shown}}, "components": {"schemas": {forged: schema}}}
    page = docs_page(document)
    assert "<script" not in page and Page(page).text.count(forged) == 11


def test_keys_are_told() -> None:
    with running(api_key=("k",)) as router:
        document = router.http.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
    assert "401" in document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "security" not in document["paths"]["/health"]["get"]
    assert all("401" in document["paths"][path]["post"]["responses"] for path in ("/tokenize", "/detokenize"))


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/v1/completions", {"prompt": "a", "logprobs": 1, "return_token_ids": True}, answers.Completion),
        ("/v1/completions", {"prompt": "ab", "prompt_logprobs": 1, "stop": "water"}, answers.Completion),
        ("/v1/chat/completions", {"messages": [USER], "logprobs": True}, answers.ChatCompletion),
        ("/v1/responses", {"input": "Hello?"}, answers.ResponseObject),
        ("/v1/responses", {"input": "Hello?", "background": True}, answers.ResponseObject),
        ("/v1/messages", {"messages": [USER], "max_tokens": 3}, answers.MessageObject),
        ("/v1/messages/count_tokens", {"messages": [USER]}, answers.TokenCount),
        ("/invocations", {"messages": [USER]}, answers.ChatCompletion),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, answers.Tokenized),
        ("/detokenize", {"tokens": [5]}, answers.Detokenized),
        ("/ping", None, answers.Health),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answers_are_what_is_told(router: Router, path: str, body: Any, answer: Any) -> None:
    given = router.http.post(path, json=body)
    assert given.status_code == 200, given.text
    msgspec.json.decode(given.content, type=answer)


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v1/models", answers.ModelList),
        ("/v1/models/tiny", answers.ModelCard),
        ("/health", answers.Health),
        ("/version", answers.Version),
        ("/load", answers.Load),
        ("/fleet", answers.FleetView),
    ],
)
def test_information_is_what_is_told(router: Router, path: str, answer: Any) -> None:
    msgspec.json.decode(router.http.get(path).content, type=answer)


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.events and o.body], ids=lambda o: o.path)
@pytest.mark.parametrize("error", [Overloaded, QueueTimeout, Unavailable, Timeout, InternalError], ids=lambda e: e.code)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_what_is_told(router: Router, operation: Operation, error: Any, stream: bool) -> None:
    """Before its first token an answer that fails has its own status and body, streamed or not."""
    given = {"prompt": "a", "messages": [USER], "input": "a", "max_tokens": 3, "stream": stream}
    known = {field for kind in _kinds(operation) for field in kind.__struct_fields__}
    body = {name: value for name, value in given.items() if name in known}
    if operation.path == "/invocations" or operation.path == "/v1/completions":
        body.pop("messages", None)
    elif operation.path == "/v1/responses":
        body.pop("prompt", None)
    router.service.refusal = error("no")
    answer = router.post(operation.path, body)
    told = openapi_document(False)["paths"][operation.path]["post"]["responses"]
    assert answer.status_code == error.status and str(error.status) in told, answer.text
    assert ("Retry-After" in told[str(error.status)].get("headers", {})) == ("retry-after" in answer.headers)
    wanted: Any = answers.AnthropicErrorBody if operation.path == "/v1/messages" else answers.ErrorBody
    found = msgspec.json.decode(answer.content, type=wanted)
    assert found.error.message == "no" and found.error.type


def _kinds(operation: Operation) -> tuple[Any, ...]:
    return operation.body if isinstance(operation.body, tuple) else (operation.body,)


def test_errors_are_what_is_told(router: Router) -> None:
    for operation in OPERATIONS:
        if operation.body is not None:
            given = router.http.post(operation.path, content=b"[")
            wanted: Any = answers.AnthropicErrorBody if "messages" in operation.path else answers.ErrorBody
            assert given.status_code == 400
            msgspec.json.decode(given.content, type=wanted)
    router.service.is_ready = False
    msgspec.json.decode(router.http.get("/health").content, type=answers.Unhealthy)
    response_id = router.openai.responses.create(model="tiny", input="a").id
    deleted = router.http.delete(f"/v1/responses/{response_id}")
    msgspec.json.decode(deleted.content, type=answers.DeletedResponse)
