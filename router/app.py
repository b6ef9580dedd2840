"""The router's HTTP application: routes, keys, errors. server.py runs it.

Starlette holds the routes; those with a body are raw ASGI (endpoints.py), without its request and response machinery,
and what they are mostly asked does not pass through its layers either (`Application`).
Request headers of ours: `X-Request-Id` (becomes part of the answer's id), `X-Penstock-Timeline: 1` (adds `timeline`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from penstock.common.chat_template import ChatTemplate
from penstock.common.config import RouterConfig, tenant_of
from penstock.common.errors import BadRequest, ConfigError, NotFound, Unauthorized
from penstock.common.generation_defaults import GenerationDefaults
from penstock.common.tokenizer import Tokenizer
from penstock.common.version import __version__
from penstock.router.anthropic.answer import anthropic_error
from penstock.router.anthropic.routes import count_tokens, plan_message
from penstock.router.chat import plan_chat
from penstock.router.chat_setup import ChatSetup
from penstock.router.completions import plan_completion
from penstock.router.docs_page import docs_page
from penstock.router.ended import RequestLog
from penstock.router.endpoints import ErrorBody, Generation, Scope, answering, internal_error
from penstock.router.error_bodies import Send, error_body, send_error
from penstock.router.fleet_view import fleet_view
from penstock.router.front import Front, RequestHead
from penstock.router.group import Group
from penstock.router.http_metrics import HttpMeter
from penstock.router.metrics import RouterMetrics
from penstock.router.openapi import GUARDED, openapi_document
from penstock.router.protocol import fields_of
from penstock.router.reply import Plan, Receive
from penstock.router.responses.routes import Responses
from penstock.router.structured import Forms
from penstock.router.token_routes import detokenize, tokenize

if TYPE_CHECKING:
    from penstock.router.service import RouterService
    from penstock.router.tracing import Tracing

log = logging.getLogger(__name__)

# The page brings all it needs: nothing is loaded from elsewhere, and nobody may frame it.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'",
    "cache-control": "no-cache",
}
Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]


class KeyGate:
    """ASGI middleware: paths whose bodies cost work, and what tells where the workers are, need one of the keys.

    It comes as `Authorization: Bearer KEY`, or as Anthropic's clients send it: `x-api-key: KEY`.
    """

    def __init__(self, app: Endpoint, keys: tuple[str, ...]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and (scope["path"] + "/").startswith(GUARDED)
        if guarded:
            number = self._number(dict(scope["headers"]))
            if number is None:
                await send_error(send, Unauthorized("the API key is missing or wrong"), [], errors_of(scope["path"]))
                return
            scope["tenant"] = tenant_of(number)
        await self._app(scope, receive, send)

    def _number(self, headers: dict[bytes, bytes]) -> int | None:
        """The place of the key that was given; None: there is none, or another."""
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = (bearer.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b""))
        # All keys are compared, and each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(value, key) for key in self._keys for value in given]
        return matches.index(True) // len(given) if any(matches) else None


class Application(Starlette):
    """Starlette, past which POST requests go straight to one of `direct` (endpoints by path).

    Its layers have nothing to do for an endpoint that answers every error itself, and each of them
    costs as much a request as the routing of ours, and something for every token of a stream.
    """

    direct: Mapping[str, Endpoint] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        endpoint = self.direct.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (endpoint or super().__call__)(scope, receive, send)


def errors_of(path: str) -> ErrorBody:
    """How errors of a path are written."""
    return anthropic_error if (path + "/").startswith("/v1/messages/") else error_body


def create_app(
    service: RouterService,
    config: RouterConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    defaults: GenerationDefaults | None = None,
) -> Application:
    """The ASGI application; it starts and stops `service` with its own life."""
    models = config.served_model_name or (config.model,)
    group = Group(config)
    tracing = _tracing(config.otlp_traces_endpoint)
    front = Front(
        service=service,
        config=config,
        tokenizer=tokenizer,
        template=template,
        defaults=defaults or GenerationDefaults(),
        metrics=RouterMetrics(service, models[0]),
        models=models,
        forms=Forms(tokenizer),
        chat=ChatSetup.load(config, tokenizer, template),
        seeds=random.Random(config.seed + group.index if config.seed else None),
        observers=[*([RequestLog()] if RequestLog.wanted() else []), *([tracing] if tracing else [])],
        tracing=tracing,
    )

    responses = Responses(front)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await front.forms.prepare()
        await service.start()
        try:
            yield
        finally:
            front.forms.close()
            await responses.close()
            if not getattr(app.state, "service_stopped", False):  # under a server other than ours
                await service.stop(0.0)
            if tracing is not None:
                await asyncio.get_running_loop().run_in_executor(None, tracing.close)

    app = Application(lifespan=lifespan)
    app.state.metrics, app.state.responses = front.metrics, responses
    app.state.takes_connections = not config.admin_port  # else server.py says when its other port is open, too
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    generating = {
        "/v1/completions": Generation(front, plan_completion),
        "/v1/chat/completions": Generation(front, plan_chat),
        "/v1/messages": Generation(front, plan_message, anthropic_error),
        "/invocations": Generation(front, _plan_invocation),
    }
    app.router.routes += [
        *_information(front, group),
        *_pages(functools.cache(lambda: openapi_document(bool(config.api_key)))),
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in generating.items()),
        *responses.routes(),
        Route("/v1/messages/count_tokens", answering(front, count_tokens, anthropic_error), methods=["POST"]),
        Route("/tokenize", answering(front, tokenize), methods=["POST"]),
        Route("/detokenize", answering(front, detokenize), methods=["POST"]),
    ]
    paths = frozenset(path for route in app.routes if "{" not in (path := getattr(route, "path", "{")))

    def guarded(endpoint: Endpoint) -> Endpoint:
        gated = KeyGate(endpoint, config.api_key) if config.api_key else endpoint
        return HttpMeter(gated, front.metrics.http, paths)

    app.add_middleware(guarded)
    app.direct = {path: guarded(endpoint) for path, endpoint in generating.items()}
    return app


def _tracing(endpoint: str) -> Tracing | None:
    """What makes traces, if they are asked for; raises ConfigError if it cannot."""
    if not endpoint:
        return None
    try:
        from penstock.router.tracing import Tracing
    except ImportError as error:
        raise ConfigError(f"--otlp-traces-endpoint needs penstock[otel]: {error}") from error
    return Tracing(endpoint)


def _information(front: Front, group: Group) -> list[Route]:
    """What is asked without a body."""

    async def health(request: Request) -> Response:
        if front.service.ready() and request.app.state.takes_connections:
            roles = Counter(worker.role for worker, _ in front.service.loads())
            body = b'{"status":"ok","workers":{"prefill":%d,"decode":%d}}' % (roles["prefill"], roles["decode"])
            return Response(body, media_type="application/json")
        reason = "its port is not open yet" if front.service.ready() else front.service.why_not_ready()
        error = b'{"status":"unavailable","reason":"%b"}' % reason.encode()
        return Response(error, 503, media_type="application/json")

    async def version(_: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def load(request: Request) -> Response:
        return JSONResponse({"server_load": (await counters(request))["in_flight"]})

    async def metrics(request: Request) -> Response:
        text = await group.metrics(request.scope, front.metrics.scrape())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def fleet(request: Request) -> Response:
        service, totals = front.service, await counters(request)
        now, states, pairs = time.monotonic(), service.states(), service.broken_pairs()
        return JSONResponse(fleet_view(front.models, totals, service.loads(), now, states, pairs))

    async def counters(request: Request) -> dict[str, int]:
        own = front.service.counters()
        return await group.counters(own) if group.is_for_all(request.scope) else own

    def card(name: str) -> dict[str, Any]:
        info = front.service.model_info()
        return {
            "id": name,
            "object": "model",
            "created": front.created,
            "owned_by": "penstock",
            "root": front.config.model,
            "parent": None,
            "max_model_len": None if info is None else info.max_model_len,
        }

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in front.models]})

    async def model(request: Request) -> Response:
        try:
            return JSONResponse(card(front.model_name(request.path_params["name"])))
        except NotFound as error:
            return Response(error_body(error), error.status, media_type="application/json")

    return [
        Route("/health", health),
        Route("/ping", health, methods=["GET", "POST"]),  # SageMaker's name for it
        Route("/version", version),
        Route("/load", load),
        Route("/metrics", metrics),
        Route("/fleet", fleet),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


def _pages(document: Callable[[], dict[str, Any]]) -> list[Route]:
    """The page to chat on, and the OpenAPI document with its own."""
    docs_html = functools.cache(lambda: docs_page(document()))
    ui_html = (Path(__file__).parent / "ui.html").read_bytes()

    async def openapi(_: Request) -> Response:
        return JSONResponse(document())

    async def docs(_: Request) -> Response:
        return Response(docs_html(), media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)

    async def ui(_: Request) -> Response:
        return Response(ui_html, media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)

    async def to_docs(_: Request) -> Response:
        return RedirectResponse("/docs")

    async def to_ui(_: Request) -> Response:
        return RedirectResponse("/ui")

    return [
        Route("/openapi.json", openapi),
        Route("/docs", docs),
        Route("/redoc", to_docs),
        Route("/ui", ui),
        Route("/", to_ui),
    ]


async def _plan_invocation(body: bytes, head: RequestHead, front: Front) -> Plan:
    """SageMaker's one route for everything: a body with `messages` is a chat's, any other a completion's."""
    plan = plan_chat if b'"messages"' in body and "messages" in fields_of(body) else plan_completion
    return await plan(body, head, front)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, in the API's shape."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    known = NotFound(f"{path}: no such route") if error.status_code == 404 else BadRequest(f"{path}: {error.detail}")
    body = errors_of(request.url.path)(known)
    return Response(body, error.status_code, dict(error.headers or {}), media_type="application/json")


async def _internal_error(request: Request, __: Exception) -> Response:
    """A fault of ours outside the generating routes; the server logs it."""
    body = errors_of(request.url.path)(internal_error())
    return Response(body, 500, media_type="application/json")
