"""Uvicorn's HTTP protocol, except that what comes has limits and a chunk of a streamed answer costs no coroutine.

Uvicorn takes a head of any length, and waits for the rest of a request, or for the first one, for ever. Here
`MAX_HEAD_BYTES` are counted before the application and its API keys are asked; a connection without a request ends
like any that is kept alive; server.py looks now and then whether those that wait for the rest of one get any. A router
that has as many connections as it may still says how it is.
Used by server.py; the application sees ASGI as ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from penstock.common.errors import BadRequest, HeadTooLarge, Overloaded, PenstockError, RequestTimeout
from penstock.common.open_files import most_clients
from penstock.common.tasks import DONE
from penstock.router.error_bodies import Send, error_body, error_headers, send_error

MAX_HEAD_BYTES = 64 << 10
# What probes, scrapers and the other processes of a group (group.py) ask: to them a full router is not a dead one.
STATUS_PATHS = frozenset({"/health", "/ping", "/metrics", "/load", "/fleet", "/version"})
SPARE_SHARE = 16  # beyond the limit this part of it is taken, to hear whether it asks for one of these
SPARE_KEEP_ALIVE_S = 5  # without a request: who connects for one sends it at once
_CLOSE = (b"connection", b"close")
_NO_HTTP = "Invalid HTTP request received."
_TOO_LARGE = f"URL and headers, or trailers, are longer than {MAX_HEAD_BYTES} bytes"


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.received = 0  # bytes so far
        self._read_from = 0  # of these, those before the last read
        self._head_from = 0  # those before the read in which the last head began
        self._passed_on = 0  # those up to the last read in which a head or body began or a body went on
        self._coming: Literal["", "head", "body"] = ""  # the part of a request that has not come to its end

    @property
    def awaits_rest(self) -> bool:
        """The rest of a request has to come for anything to go on here.

        Not while an answer is on its way, which has time limits of its own, or while we do not read.
        """
        if not self._coming or self.flow.read_paused or self.transport.is_closing():
            return False
        return self._unanswered() or self.cycle.response_complete

    def time_out(self) -> None:
        """Nothing of the rest came for too long."""
        self._refuse(RequestTimeout("the rest of the request did not come"))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        most = most_clients()
        if (over := len(self.connections) - most) > 0:
            full = Overloaded(f"this router process has {most} connections, its limit")
            if over > most // SPARE_SHARE:
                self._refuse(full)
            self.app, self.timeout_keep_alive = _status_only(self.app, full), SPARE_KEEP_ALIVE_S
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # after a reset, too

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._read_from = self.received
        self.received += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError:
            self.logger.warning(_NO_HTTP)
            self.send_400_response(_NO_HTTP)
        if not self._coming:
            self._await_request()
        elif self.received - self._passed_on > MAX_HEAD_BYTES:  # the parser keeps them: a head or trailers without end
            self._refuse(HeadTooLarge(_TOO_LARGE))

    def on_message_begin(self) -> None:
        """See httptools, as the following."""
        self._coming, self._head_from, self._passed_on = "head", self._read_from, self.received
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head that is too large and whole is asked about, in its turn, by an application that refuses it."""
        if self.received - self._head_from > MAX_HEAD_BYTES and self._head_bytes() > MAX_HEAD_BYTES:
            self.app = _refuse_head  # which ends the connection
            self.url = b"/"  # what parses URLs takes fewer bytes
        if self.parser.should_upgrade():
            return  # it is parsed again
        super().on_headers_complete()
        self._coming, self._passed_on = "body", self.received

    def on_body(self, body: bytes) -> None:
        """Of any length: who reads it sees to that."""
        self._passed_on = self.received
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Nothing is missing, unless the parser leaves what follows to another protocol."""
        if self.parser.should_upgrade():
            return
        self._coming = ""
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Of what is no HTTP."""
        self._refuse(BadRequest(msg))

    def _parse(self, data: memoryview) -> None:
        """Offers of other protocols are ignored (RFC 9110, 7.8), as Java's client makes one of HTTP/2 by default.

        To the parser, such a request ends with its head, whatever body it announces: it gets the head once more,
        without the offer. Raises httptools.HttpParserError.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offered:
                data = data[offered.args[0] :]
            head = self._head_without_offer()
            self.parser = httptools.HttpRequestParser(self)  # the old one has seen an end where nothing is kept alive
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.parser.feed_data(head)

    def _head_without_offer(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":  # what follows is another protocol's for certain
            raise httptools.HttpParserError("no proxy")
        fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        return b"".join([b"%b %b HTTP/%b\r\n" % (method, self.url, version), *fields, b"\r\n"])

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        send = chunks_at_once(cycle)
        super()._start_asgi_task(cycle, lambda scope, receive, _: app(scope, receive, send))

    def _head_bytes(self) -> int:
        first = len(self.parser.get_method()) + len(self.url) + len("  HTTP/1.1\r\n")
        return first + sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers) + len("\r\n")

    def _await_request(self) -> None:
        """Uvicorn starts this time only after an answer; what is no beginning of a request may have stopped it."""
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _refuse(self, error: PenstockError) -> None:
        """Close, with `error` as the answer of the request that is coming in if it can have one."""
        if self.transport.is_closing():
            return
        if self._unanswered():
            self.transport.write(_response(error, self.server_state.default_headers))
        self.transport.close()

    def _unanswered(self) -> bool:
        """What is written now would be the answer of the request that is coming in."""
        cycle = self.cycle
        if self._coming == "body":
            return not cycle.response_started and not self.pipeline
        return cycle is None or cycle.response_complete


async def _refuse_head(scope: Any, receive: Any, send: Send) -> None:
    await send_error(send, HeadTooLarge(_TOO_LARGE), [_CLOSE])


def _status_only(app: Any, full: Overloaded) -> Any:
    """`app` for one request of the `STATUS_PATHS`; any other one is refused."""

    async def answer(scope: Any, receive: Any, send: Send) -> None:
        async def send_last(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), _CLOSE]}
            await send(message)

        if scope["path"] in STATUS_PATHS:
            await app(scope, receive, send_last)
        else:
            await send_error(send, full, [_CLOSE])

    return answer


def _response(error: PenstockError, headers: list[tuple[bytes, bytes]]) -> bytes:
    body = error_body(error)
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), _CLOSE]
    head = [b"%b: %b\r\n" % field for field in (*headers, *fields, *error_headers(error))]
    return b"".join([STATUS_LINE[error.status], *head, b"\r\n", body])


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
