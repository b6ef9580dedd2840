"""Uvicorn's HTTP protocol as the router uses it: chunks without a coroutine, limits for what comes.

Chunks are the same bytes as uvicorn's, with its flow control. What is read in which pieces is up to the network: here a
connection gets them one by one. test_request_limits.py has the same limits over real ones.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from penstock.common.tasks import begun
from penstock.router.http_protocol import MAX_HEAD_BYTES, HttpProtocol, chunks_at_once

pytestmark = pytest.mark.asyncio
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = self.paused = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_extra_info(self, name: str) -> None:
        return None


def new_cycle(method: str = "POST") -> RequestResponseCycle:
    transport: Any = Transport()
    log = logging.getLogger("test")
    return RequestResponseCycle(
        scope={"type": "http", "method": method, "http_version": "1.1", "path": "/"},  # type: ignore[arg-type]
        transport=transport, flow=FlowControl(transport), logger=log, access_logger=log, access_log=False,
        default_headers=[], message_event=asyncio.Event(), expect_100_continue=False, keep_alive=True,
        on_response=lambda: None,
    )  # fmt: skip


def chunk(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


@pytest.mark.parametrize("method", ["POST", "HEAD"])
async def test_the_bytes_are_uvicorns(method: str) -> None:
    messages = [START, chunk(b"data: a\n\n"), chunk(b""), chunk(b"x" * 300), chunk(b"data: [DONE]\n\n", more=False)]
    theirs, ours = new_cycle(method), new_cycle(method)
    send = chunks_at_once(ours)
    for message in messages:
        await theirs.send(message)  # type: ignore[arg-type]
        await send(dict(message))
    assert b"".join(ours.transport.written) == b"".join(theirs.transport.written)  # type: ignore[attr-defined]
    assert ours.response_complete
    with pytest.raises(RuntimeError, match="already completed"):
        await send(chunk(b"late"))


async def test_a_slow_client_is_waited_for() -> None:
    cycle = new_cycle()
    send, written = chunks_at_once(cycle), cycle.transport.written  # type: ignore[attr-defined]
    await send(dict(START))
    assert begun(send(chunk(b"first"))) is None
    cycle.flow.pause_writing()
    rest = begun(send(chunk(b"second")))
    assert rest is not None
    assert b"second" not in b"".join(written)
    cycle.flow.resume_writing()
    await rest
    assert written[1:] == [b"5\r\nfirst\r\n", b"6\r\nsecond\r\n"]


async def test_nothing_is_written_for_a_client_that_is_gone() -> None:
    cycle = new_cycle()
    send = chunks_at_once(cycle)
    await send(dict(START))
    cycle.disconnected = True
    await send(chunk(b"data"))
    assert len(cycle.transport.written) == 1  # type: ignore[attr-defined]


READ = 256 << 10  # what uvloop reads at once
POST = b"POST /a HTTP/1.1\r\nhost: a\r\n"
ENDLESS = {
    "url": (b"GET /", b"a" * 1000),
    "header": (b"GET / HTTP/1.1\r\nx-a: ", b"a" * 1000),
    "headers": (b"GET / HTTP/1.1\r\n", b"x-a: a\r\n" * 100),
    "trailer": (POST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-a: ", b"a" * 1000),
    "trailers": (POST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"x-a: a\r\n" * 100),
}


class Connection:
    """One whose application answers when it is told to; `asked` has the bodies, None of a client that left."""

    def __init__(self, state: ServerState | None = None) -> None:
        self.asked: list[bytes | None] = []
        self.told = asyncio.Event()
        config = uvicorn.Config(
            self._answer, interface="asgi3", ws="none", lifespan="off", log_config=None, proxy_headers=False,
            timeout_keep_alive=75,
        )  # fmt: skip
        self.protocol = HttpProtocol(config=config, server_state=state or ServerState(), app_state={})
        self.transport: Any = Transport()
        self.protocol.connection_made(self.transport)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                self.asked.append(body)
                await send(START)
                await send(chunk(b"first"))
                await self.told.wait()
                await send(chunk(b"", more=False))
                return
        self.asked.append(None)

    async def get(self, data: bytes, pieces: int = 1 << 30) -> None:
        for start in range(0, len(data), pieces):
            if self.transport.closed:
                return
            self.protocol.data_received(data[start : start + pieces])
        for _ in range(10):
            await asyncio.sleep(0)

    async def lose(self) -> None:
        self.told.set()
        self.protocol.connection_lost(None)
        while self.protocol.tasks:
            await asyncio.sleep(0)
        assert self.protocol.timeout_keep_alive_task is None

    def ends_at(self) -> float:
        """Without a request."""
        timer = self.protocol.timeout_keep_alive_task
        assert timer is not None
        return timer.when()

    @property
    def written(self) -> bytes:
        return b"".join(self.transport.written)

    def error(self) -> tuple[int, Any]:
        """Status and code of the one error that was written before the end."""
        assert self.transport.closed
        head, _, body = self.written.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 ") and b"connection: close" in head.split(b"\r\n")
        assert f"content-length: {len(body)}".encode() in head
        return int(head[9:12]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize("pieces", [1000, READ])
@pytest.mark.parametrize("kind", ENDLESS)
async def test_what_never_ends_is_refused(kind: str, pieces: int) -> None:
    connection = Connection()
    begin, more = ENDLESS[kind]
    await connection.get(begin)
    await connection.get(more * 1000, pieces)
    assert connection.error() == (431, "head_too_large")
    assert MAX_HEAD_BYTES < connection.protocol.received <= MAX_HEAD_BYTES + len(begin) + pieces
    await connection.lose()
    assert connection.asked == ([None] if kind.startswith("trailer") else [])


@pytest.mark.parametrize("pieces", [777, READ])
@pytest.mark.parametrize("over", [0, 1, 1000])
@pytest.mark.parametrize("kind", ["url", "header", "headers"])
async def test_a_whole_head_is_measured_however_it_comes(kind: str, over: int, pieces: int) -> None:
    begin, line = b"GET /a HTTP/1.1\r\n", b"x-a: " + b"a" * 93 + b"\r\n"
    rest = MAX_HEAD_BYTES + over - len(begin) - len(b"\r\n")
    if kind == "url":
        head = begin.replace(b"a", b"a" * (rest + 1))
    elif kind == "header":
        head = begin + b"x-a: " + b"a" * (rest - 7) + b"\r\n"
    else:
        lines, rest = divmod(rest, len(line))
        head = begin + line * lines
        head = head.replace(b"a\r\n", b"a" * (rest + 1) + b"\r\n", 1)
    assert len(head) + 2 == MAX_HEAD_BYTES + over
    connection = Connection()
    await connection.get(head + b"\r\n", pieces)
    if over:
        assert connection.error() == (431, "head_too_large") and not connection.asked
    else:
        assert connection.asked == [b""] and b" 200 OK" in connection.written
    await connection.lose()


@pytest.mark.parametrize("pieces", [1000, READ, 4 * READ])
@pytest.mark.parametrize("chunks", [0, 1, 100_000])
async def test_a_body_is_no_part_of_a_head(chunks: int, pieces: int) -> None:
    """However long it is, in however many chunks, and whatever of the next request came with it."""
    body = b"a" * 300_000
    connection = Connection()
    connection.told.set()
    if chunks:
        size = len(body) // chunks
        part = b"%x\r\n%b\r\n" % (size, body[:size])
        request = POST + b"transfer-encoding: chunked\r\n\r\n" + part * chunks + b"0\r\n\r\n"
    else:
        request = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    await connection.get(request * 2 + POST, pieces)
    assert connection.asked == [body, body] and not connection.transport.closed
    await connection.get(b"content-length: 1\r\n\r\na")
    assert connection.asked == [body, body, b"a"]
    await connection.lose()


OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAA\r\nUpgrade: h2c\r\n",
    "any case": b"UPGRADE:H2C\r\nx-a:\r\nconnection: upgrade\r\n",
    "websocket": b"upgrade: websocket\r\nupgrade: a\r\nconnection: keep-alive\r\nconnection: upgrade\r\n",
}
BODIES = {
    "none": b"\r\n",
    "whole": b"content-length: 9\r\n\r\nupgrade: ",
    "chunked": b"transfer-encoding: chunked\r\n\r\n8\r\nupgrade:\r\n1\r\n \r\n0\r\n\r\n",
}


@pytest.mark.parametrize("cut", ["one byte", "one request", "head and body", "nowhere"])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("offer", OFFERS)
async def test_offers_of_other_protocols_are_ignored(
    offer: str, body: str, cut: str, caplog: pytest.LogCaptureFixture
) -> None:
    fields, blank_line, rest = (b"x-a: b\r\n" + BODIES[body]).partition(b"\r\n\r\n")
    head = POST + OFFERS[offer] + fields + blank_line
    plain = POST + b"content-length: 1\r\n\r\na"
    pieces = {"one request": [head + rest, plain, head + rest], "head and body": [head, rest, plain, head, rest]}
    connection = Connection()
    connection.told.set()
    for piece in pieces.get(cut, [head + rest + plain + head + rest]):
        await connection.get(piece, 1 if cut == "one byte" else READ)
    content = b"" if body == "none" else b"upgrade: "
    assert connection.asked == [content, b"a", content]
    assert connection.written.count(b"HTTP/1.1 200 OK") == 3 and not connection.transport.closed
    assert not connection.protocol.awaits_rest and not caplog.records
    await connection.lose()


@pytest.mark.parametrize("cut", [97, READ])
@pytest.mark.parametrize(
    "head",
    [
        POST + b"connection: close, upgrade\r\nupgrade: h2c\r\n",
        b"POST /a HTTP/1.0\r\nconnection: upgrade\r\nupgrade: a\r\n",
    ],
)
async def test_offers_over_connections_that_are_not_kept(head: bytes, cut: int) -> None:
    connection = Connection()
    connection.told.set()
    content = b"a" * 100_000
    await connection.get(head + b"content-length: 100000\r\n\r\n" + content, cut)
    assert connection.asked == [content]
    await connection.lose()


async def test_a_head_with_an_offer_is_measured_as_a_whole() -> None:
    connection = Connection()
    head = POST + OFFERS["h2c"] + b"x-a: " + b"a" * MAX_HEAD_BYTES + b"\r\ncontent-length: 1\r\n\r\n"
    await connection.get(head + b"a", MAX_HEAD_BYTES - 1)
    assert connection.error() == (431, "head_too_large") and not connection.asked
    await connection.lose()


@pytest.mark.parametrize("url", [b"a:1", b"/a"])
async def test_this_is_no_proxy(url: bytes) -> None:
    connection = Connection()
    await connection.get(b"CONNECT %b HTTP/1.1\r\nhost: a\r\n\r\n" % url)
    assert connection.error() == (400, "invalid_request") and not connection.asked
    await connection.lose()


@pytest.mark.parametrize(
    "next_one",
    [
        b"GET / HTTP/1.1\r\nx-a: " + b"a" * 2 * READ,
        b"GET / HTTP/1.1\r\nx-a: a",
        b"nonsense",
        POST + b"x: \0",
        POST + b"content-length: 9\r\n\r\na",
    ],
)
async def test_no_error_stands_within_the_answer_of_another_request(next_one: bytes) -> None:
    connection = Connection()
    await connection.get(b"GET / HTTP/1.1\r\n\r\n")
    before = connection.written
    await connection.get(next_one, READ)
    assert not connection.protocol.awaits_rest
    connection.protocol.time_out()
    assert connection.transport.closed and connection.written == before
    await connection.lose()


async def test_an_error_takes_its_turn() -> None:
    connection = Connection()
    await connection.get(b"GET / HTTP/1.1\r\n\r\n" + b"GET / HTTP/1.1\r\nx-a: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n")
    assert b"431" not in connection.written
    connection.told.set()
    await connection.get(b"")
    first, _, second = connection.written.partition(b"0\r\n\r\n")
    assert first.count(b"HTTP/1.1") == 1 and second.startswith(b"HTTP/1.1 431 ") and connection.transport.closed
    await connection.lose()


async def test_what_is_no_http_is_a_400_in_the_apis_shape() -> None:
    connection = Connection()
    await connection.get(b"nonsense\r\n\r\n")
    assert connection.error() == (400, "invalid_request")
    await connection.lose()


@pytest.mark.parametrize(
    "come", [b"P", POST, POST + b"content-length: 9\r\n\r\n", POST + b"content-length: 9\r\n\r\na"]
)
@pytest.mark.parametrize("after_another", [False, True])
async def test_the_rest_of_a_request_is_waited_for(come: bytes, after_another: bool) -> None:
    connection = Connection()
    connection.told.set()
    if after_another:
        await connection.get(b"GET / HTTP/1.1\r\n\r\n")
        connection.transport.written.clear()
        connection.asked.clear()
    assert not connection.protocol.awaits_rest
    await connection.get(come)
    assert connection.protocol.awaits_rest and connection.protocol.timeout_keep_alive_task is None
    connection.protocol.time_out()
    assert connection.error() == (408, "request_timeout") and not connection.protocol.awaits_rest
    await connection.lose()
    assert connection.asked in ([], [None])


async def test_we_do_not_wait_for_what_we_do_not_read() -> None:
    connection = Connection()
    connection.protocol.data_received(POST + b"content-length: 200000\r\n\r\n" + b"a" * 100_000)
    assert connection.transport.paused and not connection.protocol.awaits_rest
    await connection.get(b"")
    assert not connection.transport.paused and connection.protocol.awaits_rest
    await connection.lose()


async def test_a_request_that_is_answered_already_has_no_second_answer() -> None:
    connection = Connection()
    connection.protocol.app = _refuses
    await connection.get(POST + b"content-length: 9\r\n\r\n")
    before = connection.written
    assert b" 200 OK" in before
    await connection.get(b"a")
    assert connection.protocol.awaits_rest
    connection.protocol.time_out()
    assert connection.transport.closed and connection.written == before
    await connection.lose()


async def _refuses(scope: Any, receive: Any, send: Any) -> None:
    await send(dict(START))
    await send(chunk(b"no", more=False))


@pytest.mark.parametrize("come", [b"", b"\r\n", POST + b"content-length: 1\r\n\r\n|a", POST + b"\r\n|\r\n"])
async def test_a_connection_without_a_request_has_its_time(come: bytes) -> None:
    """From its beginning on, after line breaks, and after the rest of a body that nobody waited for."""
    connection = Connection()
    connection.protocol.app = _refuses
    for piece in come.split(b"|"):
        await connection.get(piece)
    protocol = connection.protocol
    assert protocol.timeout_keep_alive_task is not None and not protocol.awaits_rest
    protocol.timeout_keep_alive_handler()
    assert connection.transport.closed
    await connection.lose()


async def test_connections_leave_descriptors_for_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4, 1 << 20))
    first = Connection()
    state = first.protocol.server_state
    others = [Connection(state) for _ in range(3)]
    assert [one.transport.closed for one in (first, *others)] == [False, False, False, True]
    assert others[-1].error() == (429, "overloaded") and b"\r\nretry-after: 1\r\n" in others[-1].written
    await first.get(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert first.asked == [b""], "those that are open are served"
    for one in (first, *others):
        await one.lose()
    assert not state.connections
    later = Connection(state)
    assert not later.transport.closed
    await later.lose()


async def test_a_full_router_says_how_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a few connections more, and nothing else: each of them is closed after its one answer."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 1 << 20))
    state = ServerState()
    within = [Connection(state) for _ in range(48)]
    probe, client, silent, refused = beyond = [Connection(state) for _ in range(4)]
    assert [one.transport.closed for one in beyond] == [False, False, False, True]
    assert refused.error() == (429, "overloaded")

    probe.told.set()
    await probe.get(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n" * 2)
    assert probe.asked[0] == b"" and probe.written.count(b"HTTP/1.1 200 OK\r\n") == 1
    assert b"\r\nconnection: close\r\n" in probe.written and probe.transport.closed

    await client.get(POST + b"content-length: 9\r\n\r\na")
    assert client.error() == (429, "overloaded") and not client.asked
    assert b"\r\nretry-after: 1\r\n" in client.written

    assert silent.ends_at() < min(one.ends_at() for one in within)
    for one in (*within, *beyond):
        await one.lose()


async def test_no_timer_outlives_a_connection_that_was_reset() -> None:
    connection = Connection()
    connection.protocol.connection_lost(ConnectionResetError())
    assert connection.protocol.timeout_keep_alive_task is None
