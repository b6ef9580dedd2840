"""Responses that are made in the background: clients follow their events, or ask how they are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from penstock.common.errors import PenstockError
from penstock.common.logs import about
from penstock.router.endpoints import internal_error
from penstock.router.error_bodies import Send
from penstock.router.reply import Receive, Reply
from penstock.router.responses.answer import ResponseFormat

log = logging.getLogger(__name__)
Done = Callable[[Sequence[bytes]], Awaitable[None]]
EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class BackgroundResponse:
    """One response in the making. To its `Reply` it is the client: it takes the events, and hangs up to cancel."""

    def __init__(self, format: ResponseFormat, streamed: bool) -> None:
        self.format, self.streamed = format, streamed
        self.events: list[bytes] = []  # each at the place of its sequence number
        self._last = b""  # the events that tell how it ended
        self._complete = False
        self._news = asyncio.Event()  # set once, for those who read now, and replaced
        self._hang_up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, reply: Reply, done: Done) -> None:
        """Begin; `done` is called with all events, before anybody reads the last of them."""
        self._take(self.format.queued())
        self._task = asyncio.get_running_loop().create_task(self._run(reply, done), name="background response")

    def hang_up(self) -> None:
        """As `cancel`, and not waited for."""
        self._hang_up.set()

    async def cancel(self) -> None:
        """End it, wherever it runs; returns when nothing of it runs any more."""
        self._hang_up.set()
        await self.over()

    async def over(self) -> None:
        """Wait until nothing of it runs any more."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def follow(self, after: int, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the events behind number `after`, those to come included, until the last, or until the client leaves."""
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM + headers})
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            while not gone.done():
                news, complete = self._news, self._complete
                body = b"".join(self.events[after + 1 :])
                after = max(after, len(self.events) - 1)
                if body or complete:
                    await send({"type": "http.response.body", "body": body, "more_body": not complete})
                if complete:
                    return
                waiter = asyncio.ensure_future(news.wait())
                await asyncio.wait({waiter, gone}, return_when=asyncio.FIRST_COMPLETED)
                waiter.cancel()
        finally:
            gone.cancel()

    async def _run(self, reply: Reply, done: Done) -> None:
        try:
            await reply.run(self._receive, self._send)
            if self._hang_up.is_set() and not self.format.is_final:
                self.format.cancelled()
        except PenstockError as error:  # refused, or failed before its first token
            self._last = self.format.failure(error)
        except Exception:
            log.exception("response %s failed", self.format.response["id"], extra=about(reply.choices[0].request))
            self._last = self.format.failure(internal_error())
        finally:
            last = _apart(self._last)
            try:
                await done([*self.events, *last])
            finally:
                self.events += last
                self._complete = True
                self._wake()

    def _take(self, events: bytes) -> None:
        self.events += _apart(events)
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _receive(self) -> MutableMapping[str, Any]:
        await self._hang_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        events = message.get("body", b"")
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._last = events
        else:
            self._take(events)


def _apart(events: bytes) -> list[bytes]:
    return [event + b"\n\n" for event in events.split(b"\n\n") if event]


async def disconnected(receive: Receive) -> None:
    """Return when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
