"""A router's connections to Redis: pooled, and never a reason for a request to wait for long.

Used by `FleetReader` (redis_state.py) and `Reservations` (reservations.py), each with a pool of its own.
"""

from __future__ import annotations

import logging
import time

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

READER_TIMEOUT_S = 0.5  # the most a request waits for a Redis that hangs; then nobody asks for `AWAY_S`
CONNECT_TIMEOUT_S = 1.0  # longer: a burst can hold the event loop for that long while connections are made
AWAY_S = 1.0
MAX_CONNECTIONS = 16

log = logging.getLogger(__name__)


class RouterRedis:
    """A connection pool that never makes a request wait for long: after a failure nobody asks for `AWAY_S`."""

    def __init__(self, url: str, log_level: int = logging.WARNING) -> None:
        self._log_level = log_level  # at which failures are told
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS + 1,  # look-ups, and the listing beside them
            timeout=READER_TIMEOUT_S,
            socket_timeout=READER_TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self.client: redis.asyncio.Redis = redis.asyncio.Redis.from_pool(pool)
        self.failures = 0
        self._away_until = float("-inf")

    def is_away(self) -> bool:
        """True for a while after a failure."""
        return time.monotonic() < self._away_until

    def failed(self, error: Exception) -> None:
        """Note a failure."""
        if not self.failures or time.monotonic() > self._away_until + AWAY_S:
            log.log(self._log_level, "Redis is away, serving from the last view: %s", error)
        self.failures += 1
        self._away_until = time.monotonic() + AWAY_S
