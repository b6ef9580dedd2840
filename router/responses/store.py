"""The responses that were asked to be kept, in Redis: any router of the fleet can read them, go on from them, end them.

key                       type    holds                                                       lives
NS:response:NAME          hash    body (JSON), turns (MessagePack), streamed, wish, final     --response-ttl-s
                                  (nobody makes it any more)
NS:response:NAME:events   list    the events of one that can be read as a stream              the same
NS:response:NAME:runner   string  there while a router makes it in the background             1 lease
NS:responses              zset    names, by when they end (microseconds of Redis's clock)     as the last of them
NS:responses:TENANT       zset    those that were made with one API key                       the same
NS:response-holders       zset    tenants, by the bytes of theirs                             the same
NS:response-sizes         hash    name -> bytes; "" -> their sum, at most --response-store-mib  the same

A NAME is TENANT:ID. Where all of them together are too large, who holds most gives up its oldest: one API key that
fills the store pushes out its own, and never what is less than an equal share.

A router that makes a response in the background says how far it is a few times a second (`tend`), and hears what is
wished of it. If the router dies its lease runs out, and the response has failed. Losing Redis loses what was kept: new
answers are given all the same. tests/router/test_response_store.py holds the rules against a model of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import redis

from penstock.common.config import RouterConfig
from penstock.common.errors import Unavailable
from penstock.common.router_redis import RouterRedis
from penstock.router.responses.scripts import KEEP, TEND, WISH

ResponseKey = tuple[str, str]  # whose API key it was made with ("": no keys are asked for), and its id
Wish = Literal["cancel", "delete"]
Heard = Literal["unknown", "over", "told"]
_HEARD: tuple[Heard, ...] = ("unknown", "over", "told")  # by what the script answers
_turns = msgspec.msgpack.Decoder(tuple[bytes, ...])
_pack = msgspec.msgpack.Encoder().encode


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


class ResponseStore:
    """A router's access to them. All methods belong to one event loop.

    Raises:
        Unavailable: (all but `keep`) Redis is away.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.max_bytes = config.response_store_mib << 20
        self._namespace = config.namespace
        self._ttl_ms, self._lease_ms = int(config.response_ttl_s * 1000), int(config.lease_s * 1000)
        self._redis = RouterRedis(config.redis_url)
        client = self._redis.client
        self._keep, self._tend, self._wish = map(client.register_script, (KEEP, TEND, WISH))

    async def begin(self, key: ResponseKey, stored: Stored) -> None:
        """Note that this router makes a response from now on; raises Unavailable, as others could not ask for it."""
        if await self._put(key, stored, (), self._lease_ms) is None:
            raise Unavailable("responses in the background need Redis, which is away")

    async def keep(self, key: ResponseKey, stored: Stored, events: Sequence[bytes] = ()) -> None:
        """Keep a response whose status is final, unless it alone is larger than the store, or Redis is away."""
        await self._put(key, stored, events, 0)

    async def _put(self, key: ResponseKey, stored: Stored, events: Sequence[bytes], lease_ms: int) -> object:
        turns = _pack(stored.turns)
        size = len(stored.body) + len(turns) + sum(map(len, events))
        limits = (self.max_bytes, size, self._ttl_ms, lease_ms)
        if size > self.max_bytes:  # an earlier state of it goes all the same
            stored, turns, events = Stored(b""), b"", ()
        streamed = "1" if stored.streamed else ""
        fields: list[Any] = [self._namespace, _name(key), *limits, streamed, stored.body, turns, *events]
        return await self._ask(lambda: self._keep(args=fields))

    async def tend(self, key: ResponseKey, body: bytes, first: int, events: Sequence[bytes]) -> Wish | None:
        """Say how far a response is that this router makes, with its events from number `first` on; what is wished of
        it. All earlier events have been told; where that is not certain (Unavailable), tell them again."""
        fields: list[Any] = [self._namespace, _name(key), self._ttl_ms, self._lease_ms, body, first, *events]
        wish: bytes = self._found(await self._ask(lambda: self._tend(args=fields)))
        return None if not wish else "delete" if wish == b"delete" else "cancel"

    async def get(self, key: ResponseKey) -> Stored | None:
        """The response; None if it was never kept, is no more, or is another tenant's."""
        if not self.max_bytes:
            return None
        pipe = self._redis.client.pipeline(transaction=False)
        name = f"{self._namespace}:response:{_name(key)}"
        pipe.hmget(name, "wish", "streamed", "body", "turns")
        pipe.exists(f"{name}:runner")
        (wish, streamed, body, turns), runs = self._found(await self._ask(pipe.execute))
        if body is None or wish == b"delete":
            return None
        return Stored(body, _turns.decode(turns), bool(streamed), bool(runs))

    async def events(self, key: ResponseKey, after: int) -> list[bytes]:
        """Those of a stream behind number `after`."""
        name = f"{self._namespace}:response:{_name(key)}:events"
        found: list[bytes] = self._found(await self._ask(lambda: self._redis.client.lrange(name, after + 1, -1)))
        return found

    async def wish(self, key: ResponseKey, wish: Wish) -> Heard:
        """Have a response cancelled or deleted: by the router that makes it, if one does ("told")."""
        if not self.max_bytes:
            return "unknown"
        fields = (self._namespace, _name(key), wish)
        answer: int = self._found(await self._ask(lambda: self._wish(args=fields)))
        return _HEARD[answer]

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.client.aclose()

    async def _ask(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """The answer; None, soon, while Redis is away."""
        if self._redis.is_away():
            return None
        try:
            return await ask()
        except (redis.RedisError, OSError) as error:
            self._redis.failed(error)
            return None

    @staticmethod
    def _found(answer: Any) -> Any:
        if answer is None:
            raise Unavailable("responses cannot be looked up: Redis is away")
        return answer


def _name(key: ResponseKey) -> str:
    return ":".join(key)
