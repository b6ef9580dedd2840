"""Uvicorn's HTTP protocol, except that a chunk of a streamed answer costs no coroutine: most of them are one token.

Used by server.py; the application sees ASGI as ever.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from penstock.common.tasks import DONE
from penstock.router.error_bodies import Send


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        send = chunks_at_once(cycle)
        super()._start_asgi_task(cycle, lambda scope, receive, _: app(scope, receive, send))


def chunks_at_once(cycle: RequestResponseCycle) -> Send:
    """The `send` of an answer: what goes on a chunked body, and need not wait, is written when it is called."""
    transport, flow = cycle.transport, cycle.flow

    def send(message: Any) -> Awaitable[None]:
        if message.get("more_body") and cycle.chunked_encoding and not flow.write_paused:
            body = message.get("body")
            if body and not cycle.disconnected and not cycle.response_complete:
                transport.write(b"%x\r\n%b\r\n" % (len(body), body))
                return DONE
        return cycle.send(message)

    return send
