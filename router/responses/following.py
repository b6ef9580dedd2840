"""Following a response: its events from some number on, those to come included, until the last.

A log is all its events, one after the other. A reader says how many bytes of it it has.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from penstock.common.errors import PenstockError
from penstock.router.endpoints import disconnected
from penstock.router.error_bodies import Send
from penstock.router.reply import Receive
from penstock.router.responses.answer import written_event
from penstock.router.responses.store import ResponseKey, ResponseStore, gone

EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Log(Protocol):
    """The events of a response, as far as they are there; whole ones."""

    async def read(self, offset: int) -> tuple[bytes, bool]:
        """What lies behind `offset` bytes; whether nothing more will come. Raises PenstockError: it cannot be had."""
        ...

    async def changed(self, offset: int) -> None:
        """Return when there may be more than these bytes, or it may be over."""
        ...


class StoredLog:
    """What the store has of a response that another router makes, or made. `bell` rings when that changes."""

    def __init__(self, store: ResponseStore, key: ResponseKey, bell: asyncio.Event) -> None:
        self._store, self._key, self._bell = store, key, bell
        self._lease_s = 0.0

    async def read(self, offset: int) -> tuple[bytes, bool]:
        """See `Log`. That nobody makes it any more is the last event, then."""
        self._bell.clear()
        found = await self._store.read(self._key, offset)
        self._lease_s = found.lease_s
        if found.is_final or found.lease_s:
            return found.log, found.is_final
        whole = found.log if not offset else (await self._store.read(self._key, 0)).log
        failed = {"response": msgspec.Raw(gone(whole))}
        return found.log + written_event("response.failed", whole.count(b"\n\n"), failed), True

    async def changed(self, offset: int) -> None:
        """See `Log`; looks again at the latest when the lease has run out of who makes it."""
        await any_of(self._bell, timeout_s=self._lease_s)


async def follow(log: Log, after: int, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
    """Send the events behind number `after`, until the last, or until the client leaves."""
    await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM + headers})
    left = asyncio.ensure_future(disconnected(receive))
    offset, number, complete = 0, 0, False
    try:
        while not complete and not left.done():
            try:
                piece, complete = await log.read(offset)
                events = _from(piece, max(after + 1 - number, 0))
            except PenstockError as error:
                fields = {"code": error.code, "message": error.message, "param": error.param}
                piece, complete = b"", True
                events = written_event("error", max(after + 1, number), fields)
            offset += len(piece)
            number += piece.count(b"\n\n")
            if events or complete:
                await send({"type": "http.response.body", "body": events, "more_body": not complete})
            if not complete:
                waiter = asyncio.ensure_future(log.changed(offset))
                await asyncio.wait({waiter, left}, return_when=asyncio.FIRST_COMPLETED)
                waiter.cancel()
    finally:
        left.cancel()


async def any_of(*events: asyncio.Event, timeout_s: float) -> None:
    """Return when one of them is set, or when that time is over."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _from(piece: bytes, skip: int) -> bytes:
    """Without its first events."""
    return piece.split(b"\n\n", skip)[skip] if skip <= piece.count(b"\n\n") else b""
