"""Clients that do not read their answers: found by what waits for them, cut off, and nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from penstock.router import server
from penstock.router.unread import Unread, waiting_bytes
from tests.router.fake_router import Router, running, say

CLIENTS = 20
CHOICES = 2
BODY = {"prompt": "a", "max_tokens": 300, "logprobs": 5, "n": CHOICES}  # far more than any buffer here has room for
TEXT = "The water falls. " * 300


def test_nothing_taken_for_the_limit() -> None:
    unread: Unread[str] = Unread(10.0)
    assert unread.look({"a": 5, "b": 5}, 0.0) == []
    assert unread.look({"a": 5, "b": 4}, 9.0) == []
    assert unread.look({"a": 5, "b": 4, "c": 1}, 10.0) == ["a"]
    assert unread.look({"b": 3, "c": 1}, 19.0) == []  # slowly, but it reads
    assert unread.look({"b": 9, "c": 1}, 20.0) == ["c"]  # more was written for b
    assert unread.look({}, 21.0) == []
    assert unread.look({"b": 9}, 31.0) == []  # it had everything between


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


def cut(router: Router) -> int:
    metrics = router.server.config.app.state.metrics  # type: ignore[union-attr]
    [family] = [each for each in metrics.collect() if each.name == "penstock:connections_cut"]
    [sample] = family.samples
    assert sample.labels["reason"] == "unread"
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
