"""What every router has reserved, in Redis, so that several routers see each other's choices.

    NS:load:ROUTER   hash   incarnation -> tokens this router has under way there; "" -> 0, so that the key is there
    NS:routers       set    routers that have such a key

A router *claims* before it sends a request out: it writes its load with the new request in it, and the same script
answers what the others have reserved at that moment. Redis runs one script at a time, so of two routers that choose one
worker at once, the second sees the first one's request and can choose again. Claims that come while a write is on its
way share the next one: under load they cost less each, not more.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import redis

from penstock.common.load_scripts import WRITE_LOAD
from penstock.common.router_redis import AWAY_S, RouterRedis
from penstock.common.tasks import end_tasks

BATCH_S = 0.05  # changes that nobody waits for travel together


class Reservations:
    """Tells the other routers how many tokens this one has under way at each worker; gone a lease after the router.

    `publish` only notes, `claim` waits until it is written. A task writes absolute values, so that a slow Redis costs
    nothing and a lost write heals. All methods belong to one event loop.
    """

    def __init__(self, url: str, namespace: str, router_id: str, lease_s: float) -> None:
        self._redis = RouterRedis(url)
        self._namespace, self._router_id, self._lease_s = namespace, router_id, lease_s
        self._key, self._routers_key = f"{namespace}:load:{router_id}", f"{namespace}:routers"
        self._script = self._redis.client.register_script(WRITE_LOAD)
        self._tokens: dict[str, int] = {}
        self._written: dict[str, int] | None = None  # None: not known
        self._changed = asyncio.Event()
        self._claimed = asyncio.Event()
        self._claims: asyncio.Future[dict[str, int] | None] | None = None  # what the next write will answer
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start writing; call with the event loop running."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="reservations")

    def publish(self, incarnation: str, tokens: int) -> None:
        """This router now has `tokens` reserved at this worker; 0 forgets the worker."""
        if tokens:
            self._tokens[incarnation] = tokens
        else:
            self._tokens.pop(incarnation, None)
        self._changed.set()

    async def claim(self) -> dict[str, int] | None:
        """Wait until all that was published is written. Returns what the other routers had reserved then, by
        incarnation; None: Redis is away, or this router is being closed.
        """
        if self._closing or self._redis.is_away():
            return None
        if self._claims is None:
            self._claims = asyncio.get_running_loop().create_future()
        self._claimed.set()
        self._changed.set()
        return await asyncio.shield(self._claims)  # the others' as well: one that is cancelled ends nobody else's

    async def close(self) -> None:
        """Stop writing and take this router's load out of Redis."""
        self._closing = True
        if self._task is not None:
            await end_tasks([self._task])
        self._answer(None)
        pipe: Any = self._redis.client.pipeline(transaction=True)
        pipe.delete(self._key)
        pipe.srem(self._routers_key, self._router_id)
        try:
            await self._redis.answer(pipe.execute())
        except (redis.RedisError, OSError) as error:
            self._redis.failed(error)
        await self._redis.client.aclose()

    async def _run(self) -> None:
        refresh_at = 0.0
        while True:
            now = time.monotonic()
            if self._claims is not None or self._tokens != self._written or now >= refresh_at:
                await self._write()
                refresh_at = now + self._lease_s / 3
            await _either(self._claimed, AWAY_S if self._redis.is_away() else BATCH_S)
            await _either(self._changed, refresh_at - time.monotonic())

    async def _write(self) -> None:
        claims, self._claims = self._claims, None
        self._changed.clear()
        self._claimed.clear()
        load = dict(self._tokens)
        values = [str(part) for item in load.items() for part in item]
        arguments: list[str | int] = [self._namespace, self._router_id, int(self._lease_s * 1000), *values]
        self._written, others = None, None
        try:
            flat = await self._redis.answer(self._script([self._key, self._routers_key], arguments))
            others = {name.decode(): tokens for name, tokens in zip(flat[::2], flat[1::2], strict=True)}
            self._written = load
        except (redis.RedisError, OSError) as error:
            self._redis.failed(error)
            self._changed.set()
            self._answer(None)  # those that came meanwhile
        finally:
            if claims is not None:
                claims.set_result(others)

    def _answer(self, others: dict[str, int] | None) -> None:
        claims, self._claims = self._claims, None
        if claims is not None:
            claims.set_result(others)


async def _either(event: asyncio.Event, limit_s: float) -> None:
    """Return when the event is set, or the time is over."""
    if not event.is_set():
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(event.wait(), max(0.0, limit_s))
