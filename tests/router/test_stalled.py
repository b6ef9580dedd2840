"""Clients that do not read their answers, or send no end of a request: found, cut off, and nothing of them is left.

test_http_protocol.py has what a connection makes of all that may come.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.common.config import RouterConfig
from penstock.router import server
from penstock.router.http_protocol import MAX_HEAD_BYTES
from penstock.router.server import RouterServer
from penstock.router.stalled import LOOKS, Stalled, unread_bytes, waiting_bytes
from tests.router.fake_router import FakeService, Router, running, say

CLIENTS = 20
CHOICES = 2
BODY = {"prompt": "a", "max_tokens": 300, "logprobs": 5, "n": CHOICES}  # far more than any buffer here has room for
TEXT = "The water falls. " * 300


def test_nothing_taken_for_the_limit() -> None:
    unread: Stalled[str] = Stalled(10.0)
    assert unread.look({"a": 5, "b": 5}, 0.0) == []
    assert unread.look({"a": 5, "b": 4}, 9.0) == []
    assert unread.look({"a": 5, "b": 4, "c": 1}, 10.0) == ["a"]
    assert unread.look({"b": 3, "c": 1}, 19.0) == []  # slowly, but it reads
    assert unread.look({"b": 9, "c": 1}, 20.0) == ["c"]  # more was written for b
    assert unread.look({}, 21.0) == []
    assert unread.look({"b": 9}, 31.0) == []  # it had everything between


def test_looks_are_some_in_the_limit() -> None:
    unread: Stalled[str] = Stalled(10.0)
    assert [now for now in range(1000, 1011) if unread.due(now)] == list(range(1000, 1011, 10 // LOOKS))
    assert not any(Stalled[str](0.0).due(now) for now in range(100))


def until(check: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
    return found


def test_what_the_kernel_holds_counts_until_the_client_takes_it() -> None:
    """The kernel takes more of the buffer only after a good part of its own has gone: a slow reader shows before."""

    async def check() -> None:
        loop = asyncio.get_running_loop()
        server_end, client = _tcp_pair()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=server_end)
        client.setblocking(False)
        assert waiting_bytes(transport) == 0
        transport.write(bytes(32 << 20))
        size = waiting_bytes(transport)
        while (now := waiting_bytes(transport)) != size or client.recv(1, socket.MSG_PEEK) == b"":
            size = now
            await asyncio.sleep(0.05)
        buffered = transport.get_write_buffer_size()
        taken = 0
        while waiting_bytes(transport) >= size:
            taken += len(await loop.sock_recv(client, 1 << 16))
        assert buffered > 0 and taken < size
        transport.abort()
        client.close()
        await asyncio.sleep(0)

    asyncio.run(check())


def test_what_waits_to_be_read_has_come() -> None:
    async def check() -> None:
        server_end, client = _tcp_pair()
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=server_end)
        transport.pause_reading()
        assert unread_bytes(transport) == 0
        client.sendall(b"abc")
        assert unread_bytes(transport) == 3
        transport.abort()
        client.close()
        await asyncio.sleep(0)
        assert unread_bytes(transport) == 0

    asyncio.run(check())


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server_end, _ = listener.accept()
    return server_end, client


@pytest.fixture(scope="module")
def strict() -> Iterator[Router]:
    """A router that waits for no client longer than a moment."""
    with running(write_timeout_s=0.5, send_buffer=1) as router:
        yield router


def ask(router: Router, body: dict[str, Any]) -> socket.socket:
    """A client that sends its request and reads nothing, with a buffer as small as there is."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client.connect(("127.0.0.1", int(router.url.rpartition(":")[2])))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n"
    client.sendall(head.encode() + content)
    return client


def cut(router: Router, reason: str = "unread") -> int:
    metrics = router.server.config.app.state.metrics  # type: ignore[union-attr]
    [family] = [each for each in metrics.collect() if each.name == "penstock:connections_cut"]
    [sample] = [each for each in family.samples if each.labels["reason"] == reason]
    return int(sample.value)


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_never_read_are_cut_and_leave_nothing(
    strict: Router, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    before, service = cut(strict), strict.service
    service.script, service.step = say(TEXT), 50
    service.requests.clear()
    service.cancelled.clear()
    with caplog.at_level(logging.WARNING, "penstock"):
        clients = [ask(strict, BODY | {"stream": stream}) for _ in range(CLIENTS)]
        until(lambda: cut(strict) - before == CLIENTS)
    told = [record.message for record in caplog.records if "took nothing" in record.message]
    assert told and all("127.0.0.1" in line for line in told)
    until(lambda: not strict.server.server_state.connections and not service._tasks)
    assert len(service.requests) == CLIENTS * CHOICES
    for client in clients:
        with pytest.raises(ConnectionError):
            while client.recv(1 << 16):
                pass
        client.close()


def test_a_request_that_is_under_way_is_given_up(strict: Router) -> None:
    """Its worker is told at once: it says nothing more after a while, and holds its pages."""
    before, service = cut(strict), strict.service
    service.script, service.step, service.pause_after = say(TEXT), 50, 280
    service.cancelled.clear()
    with ask(strict, BODY | {"stream": True}):
        until(lambda: cut(strict) - before == 1)
        until(lambda: len(service.cancelled) == CHOICES)
    service.pause_after = None
    service.quiet.clear()


@pytest.mark.parametrize("impatient", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_router_that_ends_cuts_who_does_not_read_and_says_so(
    stream: bool, impatient: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a traceback; a second SIGINT waits for nobody."""
    monkeypatch.setattr(server, "FLUSH_S", 600.0 if impatient else 0.1)
    with running(send_buffer=1) as router:
        router.service.script, router.service.step = say(TEXT), 50
        client = ask(router, BODY | {"stream": stream})
        [connection] = until(lambda: list(router.server.server_state.connections))
        until(lambda: waiting_bytes(connection.transport) and not router.service._tasks)
        caplog.clear()
        router.server.force_exit = impatient
    ours = [record for record in caplog.records if record.name.startswith(("penstock", "uvicorn", "asyncio"))]
    [told] = [record for record in ours if record.levelno >= logging.WARNING]
    assert "1 connections cut whose clients (127.0.0.1) had not all of their answers" in told.message
    assert not router.server.server_state.tasks
    with client, pytest.raises(ConnectionError):
        while client.recv(1 << 16):
            pass


COMPLETION = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer k\r\n"
BEGUN = b"content-length: 100000\r\n\r\n{"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Router]:
    """A router that waits a moment for the rest of a request."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "REQUEST_S", 0.3)
        with running(api_key=("k",)) as router:
            yield router


def connect(router: Router) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(router.url.rpartition(":")[2])), timeout=60)


def rest(client: socket.socket) -> bytes:
    """All that comes until the router closes."""
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def error(answer: bytes) -> tuple[int, str, str]:
    """Status, type, code."""
    head, _, body = answer.partition(b"\r\n\r\n")
    told = json.loads(body)["error"]
    return int(head.split(b" ")[1]), told["type"], told["code"]


def counted(router: Router) -> dict[tuple[str, str, str], float]:
    """HTTP requests by method, status, handler."""
    [family] = [each for each in router.server.config.app.state.metrics.http.collect() if each.name == "http_requests"]  # type: ignore[union-attr]
    return {tuple(each.labels.values()): each.value for each in family.samples}


@pytest.mark.parametrize("path", [b"/health", b"/v1/completions"])
def test_a_head_that_is_too_large_is_refused_before_a_key_is_asked_for(impatient: Router, path: bytes) -> None:
    with connect(impatient) as client:
        client.sendall(b"GET " + path + b" HTTP/1.1\r\nhost: a\r\nx-a: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n")
        assert error(rest(client)) == (431, "invalid_request_error", "head_too_large")


def test_a_head_without_end_is_cut_off(impatient: Router) -> None:
    with connect(impatient) as client:
        client.sendall(b"GET /")
        with pytest.raises(ConnectionError):
            for _ in range(64):  # more than the buffers between the two hold
                client.sendall(b"a" * (1 << 20))


@pytest.mark.parametrize("begun", [COMPLETION, COMPLETION + BEGUN], ids=["head", "body"])
def test_a_request_of_which_nothing_more_comes_is_told_so(impatient: Router, begun: bytes) -> None:
    cuts, requests = cut(impatient, "unfinished"), Counter(counted(impatient))
    with connect(impatient) as client:
        client.sendall(begun)
        assert error(rest(client)) == (408, "invalid_request_error", "request_timeout")
    until(lambda: cut(impatient, "unfinished") == cuts + 1 and not impatient.server.server_state.tasks)
    if begun != COMPLETION:  # the route was asked
        requests["POST", "4xx", "/v1/completions"] += 1
    assert counted(impatient) == requests


def test_a_request_that_was_answered_before_its_end_has_one_answer(impatient: Router) -> None:
    with connect(impatient) as client:
        client.sendall(COMPLETION.replace(b"Bearer k", b"Bearer wrong") + BEGUN)
        answer = until(lambda: (come := client.recv(1 << 16, socket.MSG_PEEK)).endswith(b"}}") and come)
        client.sendall(b"{")  # which ends the time of a connection that may have another request
        assert error(answer)[0] == 401 and rest(client) == answer


class Slow:
    """A connection on which a request comes slowly."""

    def __init__(self, socket: socket.socket) -> None:
        self.transport = SimpleNamespace(get_extra_info=lambda _: socket)
        self.received, self.awaits_rest, self.client, self.ended = 1, True, ("127.0.0.1", 1), False

    def time_out(self) -> None:
        self.ended = True


def test_a_request_may_take_as_long_as_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time in which nothing more has to come does not count."""
    cuts: Counter[str] = Counter()
    app: Any = SimpleNamespace(state=SimpleNamespace(metrics=SimpleNamespace(connections_cut=cuts)))
    service: Any = FakeService()
    monkeypatch.setattr(server, "REQUEST_S", limit := 10)
    router = RouterServer(app, service, RouterConfig())
    ours, client = socket.socketpair()
    with ours, client:
        connection: Any = Slow(ours)
        router.server_state.connections.add(connection)
        for now in range(0, 10 * limit, limit - 1):
            connection.received += 1
            router._end_unfinished(now)
        connection.awaits_rest = False
        for now in range(10 * limit, 20 * limit):
            router._end_unfinished(now)
        connection.awaits_rest = True
        router._end_unfinished(20 * limit)
        client.send(b"a")  # and the router stands still, and has not read it
        router._end_unfinished(30 * limit)
        assert not connection.ended and not cuts
        router._end_unfinished(31 * limit - 1)
        assert not connection.ended
        router._end_unfinished(31 * limit)
        assert connection.ended and cuts == {"unfinished": 1}


@pytest.mark.parametrize(
    "come", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"], ids=["nothing", "a line break", "a request"]
)
def test_a_connection_without_a_request_is_closed(come: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.1)
    with running() as router, connect(router) as client:
        client.sendall(come)
        assert rest(client).count(b"HTTP/1.1 200 OK") == come.count(b"GET")
        assert cut(router, "unfinished") == 0
