"""Chunks of a streamed answer, written without a coroutine: the same bytes as uvicorn's, and its flow control."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from penstock.common.tasks import begun
from penstock.router.http_protocol import chunks_at_once

pytestmark = pytest.mark.asyncio
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return False


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
