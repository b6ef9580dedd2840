"""The writing end of streamed answers: one write a turn of the event loop for each stream that has something to say.

A step of a worker brings a token for every running stream, so a task switch a token is what a router cannot afford.
`put` collects; the router's one `Outbox` writes, in a single callback, what all streams have collected. Only a stream
whose client reads slowly waits, in the task of its own request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from penstock.common.tasks import begun
from penstock.router.error_bodies import Send


class Outbox:
    """What is to be written once the event loop has handled what it is at. `write` must not raise."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def add(self, write: Callable[[], None]) -> None:
        """Call `write` soon, after the others."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._write_all)
        self._due.append(write)

    def _write_all(self) -> None:
        due, self._due = self._due, []
        for write in due:
            write()


class EventStream:
    """The body of one streamed answer. What is put before `run` waits for it."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._pending: list[bytes] = []
        self._send: Send | None = None
        self._busy = True  # what is put will be written in any case: by `run`, by the outbox, or after a slow write
        self._over = False  # nothing more is to be written
        self._woken: asyncio.Future[Awaitable[None] | None] | None = None  # what `run` waits for
        self.ended = False  # the last events have been put

    @property
    def has_events(self) -> bool:
        """There is something to write."""
        return bool(self._pending)

    def put(self, events: bytes, *, last: bool = False) -> None:
        """Write them soon."""
        self._pending.append(events)
        self.ended = last
        if not self._busy:
            self._busy = True
            self._outbox.add(self._write)

    def give_up(self) -> None:
        """The client is gone: `run` returns, and nothing more is written, unless the last events have been put."""
        if not self.ended:
            self._over = True
            self._wake(None)

    async def run(self, send: Send) -> None:
        """Write everything, until the last events are out or the stream is given up; raises what `send` raises.

        The last write is this task's own: whoever stands between it and the server may have to keep the answer first.
        """
        self._send = send
        try:
            while not self._over:
                self._woken = asyncio.get_running_loop().create_future()
                self._outbox.add(self._write)
                rest = await self._woken
                if rest is not None:
                    await rest
                elif self.ended and not self._over:
                    self._over = True
                    await send({"type": "http.response.body", "body": b"".join(self._pending), "more_body": False})
        finally:
            self._over = True

    def _write(self) -> None:
        """Send what has been put. What has to wait is left to `run`, which looks again."""
        if self._over or self._send is None:
            return
        if self.ended:
            self._wake(None)
            return
        body = b"".join(self._pending)
        self._pending.clear()
        self._busy = False
        if not body:
            return
        try:
            rest = begun(self._send({"type": "http.response.body", "body": body, "more_body": True}))
        except Exception as error:
            self._over = True
            self._wake(error)
            return
        if rest is not None:
            self._busy = True
            self._wake(rest)

    def _wake(self, news: Awaitable[None] | Exception | None) -> None:
        if self._woken is None or self._woken.done():
            return
        if isinstance(news, Exception):
            self._woken.set_exception(news)
        else:
            self._woken.set_result(news)
