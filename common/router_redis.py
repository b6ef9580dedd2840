"""A router's connections to Redis: pooled, and never a reason for a request to wait for long.

Used by `FleetReader` (redis_state.py), `Reservations` (reservations.py) and the router's `ResponseStore`
(responses/store.py), each with a pool of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from penstock.common.tasks import end_tasks

READER_TIMEOUT_S = 0.5  # the most a request waits for a Redis that hangs; then nobody asks for `AWAY_S`
LOOKS = 5  # in that time
LOOKS_CONNECTING = 3  # of those: a script that Redis has not got yet takes three round trips, to connect five or more
HELD_UP_S = 5.0  # above what holds up an event loop: the client's own time limits do not know of that
CONNECT_TIMEOUT_S = 1.0
AWAY_S = 1.0
MAX_CONNECTIONS = 16

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Pool(redis.asyncio.BlockingConnectionPool):
    """Connecting goes on when nobody waits for it any more, and the next one finds it done: it takes several round
    trips, with TLS and a password eight, and begun anew each time it would never be done with a Redis that is far.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._connecting: dict[AbstractConnection, asyncio.Task[None]] = {}

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        """As the pool's, which every command begins with.

        Raises:
            redis.TimeoutError: it is not there soon enough for the command to be answered in time, too.
        """
        task = self._connecting.get(connection)
        if task is None and connection.is_connected:
            await super().ensure_connection(connection)
            return
        if task is None:
            work = super().ensure_connection(connection)
            task = asyncio.get_running_loop().create_task(work, name="connect to Redis")
            self._connecting[connection] = task
            task.add_done_callback(lambda done: self._connected(connection, done))
        for _ in range(LOOKS_CONNECTING):
            await asyncio.wait({task}, timeout=READER_TIMEOUT_S / LOOKS)
            if task.done():
                return task.result()
        raise redis.TimeoutError(f"not connected within {LOOKS_CONNECTING / LOOKS * READER_TIMEOUT_S:g} s")

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """As the pool's."""
        await end_tasks(self._connecting.values())
        await super().disconnect(inuse_connections)

    def _connected(self, connection: AbstractConnection, task: asyncio.Task[None]) -> None:
        del self._connecting[connection]
        if not task.cancelled():
            task.exception()  # who still waits is told


class RouterRedis:
    """A connection pool that never makes a request wait for long: after a failure nobody asks for `AWAY_S`."""

    def __init__(self, url: str, log_level: int = logging.WARNING) -> None:
        self._log_level = log_level  # at which failures are told
        pool = _Pool.from_url(
            url,
            max_connections=MAX_CONNECTIONS + 1,  # look-ups, and the listing beside them
            timeout=HELD_UP_S,
            socket_timeout=HELD_UP_S,
            socket_connect_timeout=HELD_UP_S,
            retry=Retry(NoBackoff(), 0),
        )
        self.client: redis.asyncio.Redis = redis.asyncio.Redis.from_pool(pool)
        self.failures = 0
        self._away_until = float("-inf")

    async def answer(self, asked: Awaitable[_T]) -> _T:
        """What Redis answers.

        An event loop that is held up, by a large body for instance, finds the answer and the end of the time at once:
        so each of a few looks takes a part of the time, however long the loop stood still before it.

        Raises:
            redis.TimeoutError: there is no answer in time.
        """
        task = asyncio.ensure_future(asked)
        try:
            for _ in range(LOOKS):
                await asyncio.wait({task}, timeout=READER_TIMEOUT_S / LOOKS)
                if task.done():
                    return task.result()
            raise redis.TimeoutError(f"no answer within {READER_TIMEOUT_S:g} s")
        finally:
            if not task.done():
                await end_tasks({task})

    def is_away(self) -> bool:
        """True for a while after a failure."""
        return time.monotonic() < self._away_until

    def failed(self, error: Exception) -> None:
        """Note a failure."""
        if not self.failures or time.monotonic() > self._away_until + AWAY_S:
            log.log(self._log_level, "Redis is away, serving from the last view: %s", error)
        self.failures += 1
        self._away_until = time.monotonic() + AWAY_S
