"""ASGI endpoints: from an HTTP request to an answer, or to the one error that says why there is none.

`Generation` runs the model, `answering` makes one JSON answer of a body at once; `Guarded` is for the rest.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from penstock.common.errors import BadRequest, InternalError, PenstockError
from penstock.common.tasks import end_tasks
from penstock.common.timeline import Timeline
from penstock.router.beams import BeamReply, BeamStreamReply
from penstock.router.ended import Ended
from penstock.router.error_bodies import Send, error_body, send_error, send_json
from penstock.router.front import Front, NoWorkerYet, RequestHead
from penstock.router.protocol import check_request_id
from penstock.router.reply import Plan, Receive, Reply, StreamReply, WholeReply

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 << 20  # below what the bus carries: what is taken can be sent on
Scope = MutableMapping[str, Any]
Planner = Callable[[bytes, RequestHead, Front], Awaitable[Plan]]
_KINDS: dict[tuple[bool, bool], type[Reply]] = {  # by (beams, stream)
    (False, False): WholeReply,
    (False, True): StreamReply,
    (True, False): BeamReply,
    (True, True): BeamStreamReply,
}
ErrorBody = Callable[[PenstockError], bytes]
_T = TypeVar("_T")


class Generation:
    """ASGI endpoint of one generating route; `plan` reads its body, `errors` writes what went wrong."""

    def __init__(self, front: Front, plan: Planner, errors: ErrorBody = error_body) -> None:
        self._front, self._plan, self._errors = front, plan, errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timeline = Timeline()
        timeline.mark("received", time.monotonic())
        head, headers, wrong = request_head(scope)
        front, reply, failure = self._front, None, None
        if front.tracing is not None:
            head = front.tracing.begin(head, timeline.marks["received"])
        try:
            if wrong is not None:
                raise wrong
            body = await read_body(receive)
            if body is None:
                return
            plan = await once_known(front, receive, lambda: self._plan(body, head, front))
            if plan is None:
                return
            timeline.mark("tokenised", time.monotonic())
            reply = _KINDS[plan.beams, plan.stream](plan, front, timeline, headers)
            if plan.conduct is None:
                await reply.run(receive, send)
            else:
                reply.over = functools.partial(self._tell, head, scope["path"], timeline)
                await plan.conduct(reply, receive, send, headers)
        except PenstockError as error:
            failure = error
            if reply is None or not reply.failed:
                front.metrics.failed(error.code)
            await send_error(send, error, headers, self._errors)
        except Exception:
            failure = internal_error()
            log.exception("a request failed", extra=head.for_log)
            if reply is not None and reply.started:
                raise  # the server cuts the connection, so that nobody takes the answer for whole
            await send_error(send, failure, headers, self._errors)
        finally:
            if reply is None or reply.over is None:  # else it may still run
                self._tell(head, scope["path"], timeline, reply, failure)
            if failure is not None:  # else it and the frames that it went through wait for a collection
                failure.__traceback__ = None

    def _tell(
        self, head: RequestHead, path: str, timeline: Timeline, reply: Reply | None, error: PenstockError | None
    ) -> None:
        if not self._front.observers:
            return
        ended = Ended.of(head, path, self._front.models[0], timeline, reply, error)
        for observer in self._front.observers:
            try:
                observer.ended(ended)
            except Exception:  # the request is answered, whatever becomes of what is told of it
                log.exception("a request's end could not be told", extra=head.for_log)


class Guarded:
    """ASGI endpoint of a route that generates nothing; `handle` also gets headers for the response."""

    def __init__(
        self,
        front: Front,
        handle: Callable[[Scope, Receive, Send, list[tuple[bytes, bytes]]], Awaitable[None]],
        errors: ErrorBody = error_body,
    ) -> None:
        self._front, self._handle, self._errors = front, handle, errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head, headers, wrong = request_head(scope)
        try:
            if wrong is not None:
                raise wrong
            await self._handle(scope, receive, send, headers)
        except PenstockError as error:
            self._front.metrics.failed(error.code)
            await send_error(send, error, headers, self._errors)
        except Exception:
            log.exception("a request failed", extra=head.for_log)
            await send_error(send, internal_error(), headers, self._errors)


def answering(
    front: Front, answer: Callable[[bytes, Front], Awaitable[bytes]], errors: ErrorBody = error_body
) -> Guarded:
    """ASGI endpoint of a route that makes one JSON answer of its body at once."""

    async def handle(scope: Scope, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        body = await read_body(receive)
        if body is None:
            return
        made = await once_known(front, receive, lambda: answer(body, front))
        if made is not None:
            await send_json(send, made, headers)

    return Guarded(front, handle, errors)


async def once_known(front: Front, receive: Receive, make: Callable[[], Awaitable[_T]]) -> _T | None:
    """What `make` makes, once more when the first worker has come if it cannot do without. None: the client left first.

    Raises:
        PenstockError: what `make` raises; no worker has come in time.
    """
    try:
        return await make()
    except NoWorkerYet as error:
        come = asyncio.ensure_future(front.service.first_worker.wait(error.message))
    left = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({come, left}, return_when=asyncio.FIRST_COMPLETED)
        if not come.done():
            return None
        come.result()
    finally:
        await end_tasks({come, left})
    return await make()


async def disconnected(receive: Receive) -> None:
    """Return when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def request_head(scope: Scope) -> tuple[RequestHead, list[tuple[bytes, bytes]], BadRequest | None]:
    """(ids and wishes from the request's headers, headers of the response, what is wrong with the request's)."""
    given, wrong, timeline, context = "", None, False, {}
    for name, value in scope["headers"]:
        if name == b"x-request-id" and value:
            given = value.decode("utf-8", "surrogateescape")  # what is no UTF-8 is not printable then
            try:
                check_request_id(given, "X-Request-Id")
            except BadRequest as error:
                given, wrong = "", error
        elif name == b"x-penstock-timeline":
            timeline = value.strip().lower() in (b"1", b"true")
        elif name in (b"traceparent", b"tracestate"):
            context[name.decode()] = value.decode("latin-1")
    unique = os.urandom(16).hex()
    answer_id = given or unique
    context["tenant"] = scope.get("tenant", "")
    head = RequestHead(answer_id=answer_id, request_id=unique, timeline=timeline, **context)
    return head, [(b"x-request-id", answer_id.encode())], wrong


async def read_body(receive: Receive) -> bytes | None:
    """The whole body; None if the client left before it was complete."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise BadRequest(f"the body is larger than {MAX_BODY_BYTES} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def internal_error() -> InternalError:
    """What a client is told of a fault of ours."""
    return InternalError("internal error; the router's log has the cause")
