"""The writing end of streamed answers: one write a turn for each stream that has something to say.

A step of a worker brings a token for every running stream, so a task switch a token is what a router cannot afford.
`put` collects; the router's one `Outbox` writes what all streams have collected, in slices of the loop's time. Only a
stream whose client reads slowly waits, in the task of its own request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from penstock.common.tasks import DONE, begun
from penstock.router.error_bodies import Send
from penstock.router.slices import Slices


class EventStream:
    """The body of one streamed answer. What is put before `run` waits for it."""

    __slots__ = ("_busy", "_outbox", "_over", "_pending", "_send", "_woken", "ended")

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
            self._outbox.add(self)

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
                self._outbox.add(self)
                rest = await self._woken
                if rest is not None:
                    await rest
                elif self.ended and not self._over:
                    self._over = True
                    await send({"type": "http.response.body", "body": b"".join(self._pending), "more_body": False})
        finally:
            self._over = True
            self._send = self._woken = None  # whose frames hold this stream

    def write(self) -> None:
        """For the outbox: send what has been put. What has to wait is left to `run`, which looks again."""
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
            sent = self._send({"type": "http.response.body", "body": body, "more_body": True})
            rest = None if sent is DONE else begun(sent)
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


class Outbox(Slices[EventStream]):
    """The streams that have something to write, each once."""

    def __init__(self) -> None:
        super().__init__(EventStream.write)
