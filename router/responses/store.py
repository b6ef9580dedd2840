"""The responses that were asked to be kept, in Redis: any router of the fleet can read them, go on from them, end them.

key                       type    holds                                                       lives
NS:response:NAME          hash    streamed, wish, final (nobody makes it any more), and then  --response-ttl-s
                                  body (JSON), turns (MessagePack)
NS:response:NAME:log      string  its events, one after the other: what there is of one in    the same
                                  the making, and what can be read again as a stream
NS:response:NAME:runner   string  there while a router makes it in the background             1 lease
NS:responses              zset    names, by when they end (microseconds of Redis's clock)     as the last of them
NS:responses:TENANT       zset    those that were made with one API key                       the same
NS:response-holders       zset    tenants, by the bytes of theirs                             the same
NS:response-sizes         hash    name -> bytes; "" -> their sum, at most --response-store-mib  the same

A NAME is TENANT:ID. Where all of them together are too large, who holds most gives up its oldest: one API key that
fills the store pushes out its own, and never what is less than an equal share.

A router that makes a response in the background appends what is new to its log (`tell`), and hears what is wished of
it. On the channel NS:response:NAME it says that there is more, or that it is over; on NS:response:NAME:wish others say
that they wish something (news.py). If the router dies its lease runs out, and the response has failed. Losing Redis
loses what was kept: new answers are given all the same. tests/router/test_response_store.py holds the rules against a
model of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec
import redis

from penstock.common.config import RouterConfig
from penstock.common.errors import NotFound, Unavailable
from penstock.common.router_redis import MAX_CONNECTIONS, RouterRedis
from penstock.router.dispatch import SHUTTING_DOWN
from penstock.router.responses.grown import grown
from penstock.router.responses.news import News
from penstock.router.responses.scripts import READ, WISH, WRITE

ResponseKey = tuple[str, str]  # whose API key it was made with ("": no keys are asked for), and its id
Wish = Literal["cancel", "delete"]
Heard = Literal["unknown", "over", "told"]
_HEARD: tuple[Heard, ...] = ("unknown", "over", "told")  # by what the script answers
GONE = "the router that made it is gone"
_turns = msgspec.msgpack.Decoder(tuple[bytes, ...])
_pack = msgspec.msgpack.Encoder().encode
_json = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Stored:
    """A response as JSON.

    `turns` has the items of the conversation up to here, a JSON list for each turn's input and output; with `streamed`
    its events can be read again; `made_elsewhere` while a router makes it.
    """

    body: bytes
    turns: tuple[bytes, ...] = ()
    streamed: bool = False
    made_elsewhere: bool = False


class Told(NamedTuple):
    """What who makes a response hears: its end is wished, it is followed elsewhere, what was told before is gone."""

    wished: bool
    followed: bool
    lost: bool


class Found(NamedTuple):
    """What Redis has of a response; `lease_s` is what is left of the lease of who makes it, 0 if nobody does."""

    is_final: bool
    streamed: bool
    body: bytes
    turns: bytes
    lease_s: float
    log: bytes


class ResponseStore:
    """A router's access to them. All methods belong to one event loop.

    Raises:
        Unavailable: (all but `keep`) Redis is away, or (`get`, `read`) this router ends.
        NotFound: (`get`, `read`) it was never kept, is no more, or is another tenant's.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.max_bytes = config.response_store_mib << 20
        self.lease_s = config.lease_s
        self._namespace = config.namespace
        self._ttl_ms = int(config.response_ttl_s * 1000)
        self._redis = RouterRedis(config.redis_url)
        self._news = News(config.redis_url)
        self._leaving = False
        self._patient = asyncio.Semaphore(MAX_CONNECTIONS // 2)  # what nobody waits for takes no more of them
        self._write, self._read, self._wish = map(self._redis.client.register_script, (WRITE, READ, WISH))

    async def tell(self, key: ResponseKey, streamed: bool, offset: int, piece: bytes) -> Told:
        """Say how far a response is that this router makes: its log from `offset` bytes on; at 0 it begins (again).

        What comes before has been told; where that is not certain (Unavailable), tell it again.
        """
        async with self._patient:
            answer = await self._put(key, int(self.lease_s * 1000), streamed, offset, piece, b"", b"")
        if answer is None:
            raise Unavailable("responses in the background need Redis, which is away")
        return Told(answer[0] in (b"cancel", b"delete"), answer[1] > 0, answer[0] == b"lost")

    async def keep(self, key: ResponseKey, stored: Stored, log: bytes = b"", told: int = 0) -> bool:
        """Keep a response whose status is final; what was told of it goes, but for the log of one that is streamed.

        Not kept: what is larger than the store. `told` are the bytes of the log that were told. False: Redis is away.
        """
        if not stored.streamed:
            log, told = b"", 0
        turns = _pack(stored.turns)
        answer = await self._put(key, 0, stored.streamed, told, log[told:], stored.body, turns)
        if answer is not None and answer[0] == b"lost":
            answer = await self._put(key, 0, stored.streamed, 0, log, stored.body, turns)
        return answer is not None

    async def _put(self, key: ResponseKey, lease_ms: int, streamed: bool, *written: int | bytes) -> Any:
        limits = (self.max_bytes, self._ttl_ms, lease_ms)
        fields: list[Any] = [self._namespace, _name(key), *limits, "1" if streamed else "", *written]
        return await self._ask(lambda: self._write(args=fields))

    async def get(self, key: ResponseKey) -> Stored:
        """The response, as it is now. What nobody makes any more, and has no end, has failed."""
        found = await self._look(key, "")
        if found.is_final:
            return Stored(found.body, _turns.decode(found.turns), found.streamed)
        if found.lease_s:
            return Stored(_json(grown(found.log)), (), found.streamed, made_elsewhere=True)
        return Stored(gone(found.log), (), found.streamed)

    async def read(self, key: ResponseKey, offset: int) -> Found:
        """The response with its log from `offset` bytes on."""
        async with self._patient:
            return await self._look(key, offset)

    async def _look(self, key: ResponseKey, offset: int | Literal[""]) -> Found:
        if self._leaving:
            raise Unavailable(SHUTTING_DOWN)
        fields: list[Any] = [self._namespace, _name(key), offset]
        found = self._found(await self._ask(lambda: self._read(args=fields))) if self.max_bytes else ()
        if not found:
            raise unknown(key)
        is_final, streamed, body, turns, lease_ms, log = found
        return Found(bool(is_final), bool(streamed), body, turns, max(lease_ms, 0) / 1000, log)

    async def wish(self, key: ResponseKey, wish: Wish) -> Heard:
        """Have a response cancelled or deleted: by the router that makes it, if one does ("told")."""
        if not self.max_bytes:
            return "unknown"
        fields = (self._namespace, _name(key), wish)
        answer: int = self._found(await self._ask(lambda: self._wish(args=fields)))
        return _HEARD[answer]

    def changes(self, key: ResponseKey, bell: asyncio.Event) -> AbstractAsyncContextManager[None]:
        """Have `bell` rung when there is more of a response that another router makes, or when it is over."""
        return self._news.listening(f"{self._namespace}:response:{_name(key)}", bell)

    def wishes(self, key: ResponseKey, bell: asyncio.Event) -> AbstractAsyncContextManager[None]:
        """Have `bell` rung when another router wishes something of one that this router makes: `tell` hears what."""
        return self._news.listening(f"{self._namespace}:response:{_name(key)}:wish", bell)

    @property
    def leaving(self) -> bool:
        """`leave` was called."""
        return self._leaving

    def leave(self) -> None:
        """This router ends: who follows or waits for what others make hears so. What it makes itself can be kept."""
        self._leaving = True
        self._news.ring_all()

    async def close(self) -> None:
        """Close the connections."""
        await self._news.close()
        await self._redis.client.aclose()

    async def _ask(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """The answer; None, soon, while Redis is away."""
        if self._redis.is_away():
            return None
        try:
            return await self._redis.answer(ask())
        except (redis.RedisError, OSError) as error:
            self._redis.failed(error)
            return None

    @staticmethod
    def _found(answer: Any) -> Any:
        if answer is None:
            raise Unavailable("responses cannot be looked up: Redis is away")
        return answer


def gone(log: bytes) -> bytes:
    """A response, by its log, that nobody makes any more, as JSON."""
    return _json(grown(log) | {"status": "failed", "error": {"code": "server_error", "message": GONE}})


def unknown(key: ResponseKey) -> NotFound:
    """What is said of a response that is not there."""
    return NotFound(f"there is no response {key[1]!r} here", param="response_id")


def _name(key: ResponseKey) -> str:
    return ":".join(key)
