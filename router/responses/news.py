"""Hearing of changes in Redis without asking: one subscription a router, and a bell for everybody who waits.

A bell says "look again", never what there is to see: news that was missed while Redis was away costs one look, and who
looks finds out himself that Redis is away. The connection is made when somebody waits for the first time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.connection import AbstractConnection

from penstock.common.router_redis import AWAY_S, CONNECT_TIMEOUT_S
from penstock.common.tasks import end_tasks

log = logging.getLogger(__name__)


class News:
    """A router's subscription. All methods belong to one event loop."""

    def __init__(self, url: str) -> None:
        options: dict[str, Any] = {"protocol": 2, "socket_timeout": None, "socket_connect_timeout": CONNECT_TIMEOUT_S}
        if not url.startswith("unix:"):
            options["socket_keepalive"] = True  # nothing is said for hours: else a lost host would go unnoticed
        self._pool = redis.asyncio.ConnectionPool.from_url(url, **options)
        self._bells: dict[str, set[asyncio.Event]] = {}  # by channel
        self._connection: AbstractConnection | None = None  # while it can be spoken on
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def listening(self, channel: str, bell: asyncio.Event) -> AsyncIterator[None]:
        """Have `bell` set whenever something was published on `channel`, or may have been, unheard."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._listen(), name="news of responses")
        bells = self._bells.setdefault(channel, set())
        bells.add(bell)
        try:
            if len(bells) == 1:
                await self._say("SUBSCRIBE", [channel])
            yield
        finally:
            bells.discard(bell)
            if not bells and self._bells.get(channel) is bells:
                del self._bells[channel]
                await self._say("UNSUBSCRIBE", [channel])

    async def close(self) -> None:
        """End the subscription."""
        if self._task is not None:
            await end_tasks([self._task])

    def ring_all(self) -> None:
        """Have everybody look again."""
        self._ring(list(self._bells))

    async def _listen(self) -> None:
        while True:
            connection: AbstractConnection = self._pool.connection_class(**self._pool.connection_kwargs)
            try:
                await connection.connect()  # type: ignore[no-untyped-call]
                self._connection = connection
                await self._say("SUBSCRIBE", self._bells)
                while True:
                    _, channel, _ = await connection.read_response()  # that a subscription begins rings, too
                    self._ring([channel.decode()])
            except (redis.RedisError, OSError) as error:
                log.debug("no news of responses: %s", error)
            finally:
                self._connection = None
                await connection.disconnect(nowait=True)
            self.ring_all()
            await asyncio.sleep(AWAY_S)

    async def _say(self, command: str, channels: Iterable[str]) -> None:
        """Without a connection nothing is said: the next one begins with all channels."""
        channels = list(channels)
        if channels and self._connection is not None and self._connection.is_connected:
            with contextlib.suppress(redis.RedisError, OSError):  # who reads notices that it is broken
                await self._connection.send_command(command, *channels, check_health=False)

    def _ring(self, channels: Iterable[str]) -> None:
        for channel in channels:
            for bell in self._bells.get(channel, ()):
                bell.set()
