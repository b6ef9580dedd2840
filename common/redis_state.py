"""The fleet's state in Redis (plain server, 6.2 or newer): every key is here. Workers write, routers read.

key                     type    holds                                        lives      bounded by
NS:workers              set     incarnations of workers                      10 leases  workers (dead ones removed)
NS:worker:INCARNATION   string  `WorkerInfo`, MessagePack                    1 lease    one a worker
NS:index:INCARNATION    string  the worker's slot in the prefix index        1 lease    one a worker
NS:slots                hash    slot -> incarnation                          2 hours    workers, and the dead till swept
NS:pages:GEN:BUCKET     hash    page hash -> slots of its holders            1 hour     num_pages of all workers
NS:sweeper              string  the worker that looks for dead slots         1 lease    one
NS:routers              set     router ids                                   10 leases  routers (dead ones removed)
NS:load:ROUTER          hash    incarnation -> tokens this router reserved   1 lease    workers

All of it is a view that its writer can rebuild: losing Redis costs cache hits and news, never a request. What routers
keep of responses (response..., responses...) is in router/responses/store.py. The prefix
index (slots, pages) is described in prefix_index.py, what routers reserve (routers, load) in reservations.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from penstock.common.announcements import Announcements
from penstock.common.histogram import LOOKUP_SECONDS, Histogram
from penstock.common.index_writer import IndexWriter, Sweeper
from penstock.common.messages import WorkerInfo, decode_worker_info, encode
from penstock.common.prefix_index import LOOK_UP, REANNOUNCE_S, pack
from penstock.common.router_redis import AWAY_S, MAX_CONNECTIONS, RouterRedis

BATCH_S = 0.05  # changes of pages within this time travel together
WRITER_TIMEOUT_S = 2.0
SWEEP_PAUSE_S = 0.005  # between two pieces of a sweep, each about a millisecond of Redis
LEAVE_S = 1.0  # the most that taking one's pages out of Redis may hold up the end of a worker; a sweep does the rest
MAX_PENDING = 100_000  # page changes kept for a Redis that is away; beyond, all pages are announced anew
MAX_PAGES_LOOKED_UP = 8192  # 131,000 tokens in pages of 16

log = logging.getLogger(__name__)


class RegistryWriter:
    """Announces one worker and the pages it caches, from a thread of its own: Redis never holds up the engine.

    `publish` is cheap and may be called from any thread. While Redis is away the newest state is kept; when it is back
    (even empty) the worker registers and announces all its pages again. The thread also takes workers that have gone
    out of the index, when no other worker does.
    """

    def __init__(self, url: str, namespace: str, worker: WorkerInfo) -> None:
        self.connected = False  # False as well before the first answer
        self._away = False
        self._worker = worker
        self._namespace = namespace
        self._ttl_ms = int(worker.lease_s * 1000)
        self._worker_key = f"{namespace}:worker:{worker.incarnation}"
        self._redis: redis.Redis = redis.Redis.from_url(
            url,
            socket_timeout=WRITER_TIMEOUT_S,
            socket_connect_timeout=WRITER_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._index = IndexWriter(self._redis, namespace, worker.incarnation, worker.lease_s)
        self._sweeper = Sweeper(self._redis, namespace, worker.incarnation, worker.lease_s)
        self._lock = threading.Lock()  # guards the announcements
        self._announcements = Announcements(MAX_PENDING)
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registry", daemon=True)
        self._thread.start()

    def publish(self, added: Iterable[tuple[bytes, bytes]], removed: Iterable[bytes]) -> None:
        """Pages that the worker caches from now on, as (page hash, parent), and those that it does not any more."""
        with self._lock:
            self._announcements.publish(added, removed)
        self._changed.set()

    def index_load(self) -> dict[str, int]:
        """This worker's part of the prefix index, by fields of `WorkerLoad`."""
        return {
            "index_pages": self._announcements.num_held,
            "index_pending": self._announcements.num_pending,
            "index_losses": self._index.losses,
            "index_repaired": self._index.repaired,
        }

    def close(self, deregister: bool = True) -> None:
        """Stop the thread; with `deregister` take the worker's keys out of Redis (else its lease runs out)."""
        self._closing.set()
        self._changed.set()
        self._thread.join()
        if deregister:
            try:
                self._redis.delete(self._worker_key)
                self._redis.srem(f"{self._namespace}:workers", self._worker.incarnation)
                if self.connected:
                    self._announcements.leave()
                    self._write_pages(time.monotonic() + LEAVE_S)
                self._index.leave(self._announcements)
            except redis.RedisError as error:
                log.info("could not deregister (the lease will run out): %s", _reason(error))
        self._redis.close()

    def _run(self) -> None:
        refresh_at = 0.0
        while not self._closing.is_set():
            now = time.monotonic()
            try:
                if now >= refresh_at or not self.connected:
                    self._register()
                    refresh_at = now + self._worker.lease_s / 3
                self._write_pages(refresh_at)
                sweeping = self._sweeper.step()
                self._note(True)
            except redis.RedisError as error:
                self._note(False, error)
                self._closing.wait(min(AWAY_S, self._worker.lease_s / 3))
                continue
            if sweeping:
                self._closing.wait(SWEEP_PAUSE_S)
            else:
                self._changed.wait(max(0.0, refresh_at - time.monotonic()))
                self._changed.clear()
                self._closing.wait(BATCH_S)

    def _register(self) -> None:
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(self._worker_key, encode(self._worker), px=self._ttl_ms)
        pipe.sadd(f"{self._namespace}:workers", self._worker.incarnation)
        pipe.pexpire(f"{self._namespace}:workers", 10 * self._ttl_ms)
        pipe.execute()
        self._enter_index()
        with self._lock:
            share = self._worker.lease_s / 3 / REANNOUNCE_S
            self._announcements.repeat(math.ceil(self._announcements.num_held * share))
        self._sweeper.begin()

    def _enter_index(self) -> None:
        with self._lock:
            seq, known = self._announcements.seq, not self._announcements.overflowed
        if self._index.enter(seq, known):
            with self._lock:
                self._announcements.restart()

    def _write_pages(self, until: float) -> None:
        """Write batches until none is left, or it is time to do something else."""
        while time.monotonic() < until:
            with self._lock:
                batch = self._announcements.next()
                overflowed = self._announcements.overflowed
            if overflowed or (batch is not None and not self._index.write(batch)):
                self._enter_index()
            elif batch is None:
                return
            else:
                with self._lock:
                    self._announcements.acknowledged()

    def _note(self, connected: bool, error: Exception | None = None) -> None:
        if connected and not self.connected:
            log.info("worker %s is registered in Redis", self._worker.worker_id)
        elif error is not None and not self._away:
            log.warning("Redis is away: %s", _reason(error))
        self.connected, self._away = connected, not connected


def _reason(error: Exception) -> str:
    """Of a pipeline's error without the command that it begins with: a worker's record is bytes, not text."""
    return str(error).rpartition(" of pipeline caused error: ")[2]


@dataclass(frozen=True)
class Lookup:
    """What Redis knows about one worker, for one prompt."""

    held_pages: int  # full pages of the prompt that the worker caches, from the start
    reserved_tokens: int  # by the other routers


class FleetReader:
    """A router's view of the workers. Every method answers None, soon, while Redis is away."""

    def __init__(self, url: str, namespace: str, router_id: str, log_level: int = logging.WARNING) -> None:
        self.other_routers = 0  # that were there at the last look-up
        self._unreadable: set[str] = set()  # incarnations of workers that have been told of
        self._log_level = log_level
        self._redis = RouterRedis(url, log_level)
        self._namespace = namespace
        self._router_id = router_id
        self._turn = asyncio.Semaphore(MAX_CONNECTIONS)  # a burst waits for connections; that is no failure
        self._look_up = self._redis.client.register_script(LOOK_UP)
        self.lookup_s = Histogram(LOOKUP_SECONDS)

    @property
    def away(self) -> bool:
        """Redis did not answer a moment ago."""
        return self._redis.is_away()

    @property
    def failures(self) -> int:
        """How often Redis did not answer."""
        return self._redis.failures

    async def workers(self) -> list[WorkerInfo] | None:
        """Every worker whose lease is alive; a record that cannot be read (another version's) is left out."""
        if self._redis.is_away():
            return None
        client, answer, index = self._redis.client, self._redis.answer, f"{self._namespace}:workers"
        try:
            # Where there is nothing to choose from, nothing is looked up: who shares the room there has to be known.
            self.other_routers = max(0, await answer(client.scard(f"{self._namespace}:routers")) - 1)
            # Bytes, of a client that does not decode.
            incarnations: list[Any] = sorted(await answer(client.smembers(index)))
            if not incarnations:
                return []
            keys = [f"{self._namespace}:worker:{i.decode()}" for i in incarnations]
            records: list[Any] = await answer(client.mget(keys))
            dead = [i for i, record in zip(incarnations, records, strict=True) if record is None]
            if dead:  # a worker that lives after all adds itself again with its next refresh
                await answer(client.srem(index, *dead))
        except (redis.RedisError, OSError) as error:
            self._redis.failed(error)
            return None
        found = zip(incarnations, records, strict=True)
        return self._readable({i.decode(): record for i, record in found if record is not None})

    async def look_up(self, incarnations: Sequence[str], hashes: Sequence[bytes]) -> dict[str, Lookup] | None:
        """For each worker how much of the prompt's prefix it holds, and what others reserved, in one round trip.

        `hashes` are the prompt's page hashes in order, all of these workers' hash scope. What is in the index belongs
        to an incarnation, so what a restarted worker held before does not count.
        """
        if self._redis.is_away() or not incarnations:
            return None
        keys = [f"{self._namespace}:index:{incarnation}" for incarnation in incarnations]
        pages = pack(hashes[:MAX_PAGES_LOOKED_UP])
        async with self._turn:
            if self._redis.is_away():  # it went while we waited
                return None
            began = time.monotonic()
            try:
                asked = self._look_up(keys, [self._namespace, self._router_id, pages, *incarnations])
                answer: list[int] = await self._redis.answer(asked)
                self.lookup_s.observe(time.monotonic() - began)
            except (redis.RedisError, OSError) as error:
                self._redis.failed(error)
                return None
        self.other_routers = answer[-1]
        return {one: Lookup(answer[2 * i], answer[2 * i + 1]) for i, one in enumerate(incarnations)}

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.client.aclose()

    def _readable(self, records: Mapping[str, bytes]) -> list[WorkerInfo]:
        workers, unreadable = [], set()
        for incarnation, record in records.items():
            try:
                workers.append(decode_worker_info(record))
            except (msgspec.MsgspecError, ValueError) as error:
                unreadable.add(incarnation)
                if incarnation not in self._unreadable:
                    told = "the record of worker %s cannot be read, so it is not used: %s"
                    log.log(self._log_level, told, incarnation, error)
        self._unreadable = unreadable
        return workers
