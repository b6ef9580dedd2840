"""A response that this router makes in the background: its log grows here, and is told to the other routers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from penstock.common.errors import PenstockError, Unavailable
from penstock.common.logs import about
from penstock.common.router_redis import AWAY_S
from penstock.router.endpoints import internal_error
from penstock.router.reply import Reply
from penstock.router.responses.answer import ResponseFormat
from penstock.router.responses.following import any_of
from penstock.router.responses.grown import merged
from penstock.router.responses.store import ResponseKey, ResponseStore, Stored

log = logging.getLogger(__name__)
TELL_S = 0.25  # at least between two times that others are told how far it is
TELL_FOLLOWERS_S = 0.02  # the same, while somebody follows it at another router
KEEP_FOR_S = 60.0  # how long its end is held for a Redis that is away: a restart, not an outage of hours


class BackgroundResponse:
    """One response in the making, a `Log` to those who follow it here.

    To its `Reply` it is the client: it takes the events, and hangs up to cancel.
    """

    def __init__(
        self,
        key: ResponseKey,
        format: ResponseFormat,
        streamed: bool,
        store: ResponseStore,
        stored: Callable[[], Stored],
    ) -> None:
        """`stored` is what is kept of it, once its status is final."""
        self.format, self.streamed, self.stored = format, streamed, stored
        self._key, self._store = key, store
        self._log = bytearray(format.queued())
        self._last = b""  # the events that tell how it ended
        self._told = 0  # bytes of the log
        self._written = 0  # bytes of it in the store, which are fewer where nobody follows it
        self._again_at = 0.0  # when it may be told from the beginning, if it was lost
        self.held = False  # it is over, and Redis, which is away, has not got it yet
        self._ending = False
        self._complete = asyncio.Event()  # it is over, and stored unless Redis is away
        self._grown = asyncio.Event()  # set once, for those who wait now, and replaced
        self._hurry = asyncio.Event()  # it is ending, or others wish something of it
        self._hang_up = asyncio.Event()

    async def begin(self) -> None:
        """Note that this router makes it; raises Unavailable, as others could not ask for it."""
        await self._tell()

    def start(self, reply: Reply) -> asyncio.Task[None]:
        """Make it; ends when nothing of it runs any more."""
        self._task = asyncio.get_running_loop().create_task(self._run(reply), name="background response")
        return self._task

    async def cancel(self) -> None:
        """End it, wherever it runs; returns when it is over."""
        self._hang_up.set()
        await self.over()

    async def over(self) -> None:
        """Wait until it is over, and stored unless Redis is away."""
        await self._complete.wait()

    async def gone(self) -> None:
        """Wait until nothing of it is here any more."""
        await asyncio.wait({self._task})

    async def read(self, offset: int) -> tuple[bytes, bool]:
        """See `Log`."""
        return bytes(self._log[offset:]), self._complete.is_set()

    async def changed(self, offset: int) -> None:
        """See `Log`."""
        if len(self._log) == offset and not self._complete.is_set():
            await self._grown.wait()

    async def _run(self, reply: Reply) -> None:
        telling = asyncio.get_running_loop().create_task(self._keep_telling(), name="tell of a background response")
        try:
            await reply.run(self._receive, self._send)
            if self._hang_up.is_set() and not self.format.is_final:
                self.format.cancelled()
        except PenstockError as error:  # refused, or failed before its first token
            self._last = self.format.failure(error)
        except Exception:
            log.exception("response %s failed", self._key[1], extra=about(reply.choices[0].request))
            self._last = self.format.failure(internal_error())
        finally:
            self._ending = True
            self._hurry.set()
            whole = b""
            try:
                await telling
                whole = bytes(self._log) + self._last
                self.held = not await self._keep(whole)
            finally:  # nobody hears of the end before it is stored, if it can be
                self._complete.set()
                self._grow(self._last)
            until = time.monotonic() + KEEP_FOR_S
            while self.held and not self._store.leaving and time.monotonic() < until:
                await asyncio.sleep(AWAY_S)
                self.held = not await self._keep(whole)

    async def _keep(self, whole: bytes) -> bool:
        return await self._store.keep(self._key, self.stored(), whole, self._written)

    async def _keep_telling(self) -> None:
        """Tell the other routers how far it is, and do what they wish, until it is over."""
        async with self._store.wishes(self._key, self._hurry):
            while not self._ending:
                self._hurry.clear()
                followed = False
                with contextlib.suppress(Unavailable):  # told again the next time
                    followed = await self._tell()
                await any_of(self._hurry, timeout_s=TELL_FOLLOWERS_S if followed else TELL_S)
                if len(self._log) == self._told:
                    await any_of(self._hurry, self._grown, timeout_s=self._store.lease_s / 3)

    async def _tell(self) -> bool:
        """Tell what has not been told, all of it if that was lost; whether anybody follows it elsewhere."""
        size = len(self._log)
        piece = bytes(self._log[self._told : size])
        if not self.streamed:
            piece = merged(piece)
        told = await self._store.tell(self._key, self.streamed, self._written, piece)
        self._told = size
        self._written += len(piece)
        if told.wished:
            self._hang_up.set()
        now = asyncio.get_running_loop().time()
        if told.lost and now >= self._again_at:  # once a lease: the store may be too small for it
            self._again_at = now + self._store.lease_s
            self._told = self._written = 0
            return await self._tell()
        return told.followed

    def _grow(self, events: bytes) -> None:
        self._log += events
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    async def _receive(self) -> MutableMapping[str, Any]:
        await self._hang_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        events = message.get("body", b"")
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._last = events
        else:
            self._grow(events)
