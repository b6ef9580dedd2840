"""Errors as the OpenAI API writes them: {"error": {message, type, param, code}}. Used by app.py and reply.py."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from penstock.common.errors import Overloaded, PenstockError, Unauthorized, Unavailable

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
RETRY_AFTER_S = 1


def error_body(error: PenstockError) -> bytes:
    """The JSON body of an error; also the payload of an error event in a stream."""
    fields = {"message": error.message, "type": error.openai_type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def error_headers(error: PenstockError) -> list[tuple[bytes, bytes]]:
    """Headers that belong to an error besides its content type."""
    if isinstance(error, Overloaded):
        headers = [(b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s)))]
        # OpenAI's clients try 429s again by themselves, unless they are told not to.
        return [*headers, (b"x-should-retry", b"false")] if error.hopeless else headers
    if isinstance(error, Unavailable):
        return [(b"retry-after", b"%d" % RETRY_AFTER_S)]
    return [(b"www-authenticate", b"Bearer")] if isinstance(error, Unauthorized) else []


async def send_error(
    send: Send,
    error: PenstockError,
    headers: list[tuple[bytes, bytes]],
    body: Callable[[PenstockError], bytes] = error_body,
) -> None:
    """Answer a request that has no answer yet with `error`, written by `body`; `headers` are added."""
    await send_json(send, body(error), error_headers(error) + headers, error.status)


async def send_json(send: Send, body: bytes, headers: list[tuple[bytes, bytes]], status: int = 200) -> None:
    """A whole JSON response."""
    length = (b"content-length", b"%d" % len(body))
    start = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
