"""Writes one worker's part of the prefix index, and sweeps dead workers out of it. Called by the registry thread only.

Every method may raise `redis.RedisError`; it can then be called again.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

import redis

from penstock.common.announcements import Announcements, Batch
from penstock.common.prefix_index import BEGIN_SWEEP, BUCKET_BITS, BUCKET_TTL_S, LEAVE, REGISTER, SWEEP, WRITE, pack

log = logging.getLogger(__name__)


class IndexWriter:
    """One incarnation's slot in the index."""

    def __init__(self, client: redis.Redis, namespace: str, incarnation: str, lease_s: float) -> None:
        self.losses = 0  # times that the index held nothing of this worker any more
        self.repaired = 0  # pages that it had lost
        self._namespace = namespace
        self._incarnation = incarnation
        self._lease_ms = int(lease_s * 1000)
        self._bucket_ttl_ms = int(BUCKET_TTL_S * 1000)
        self._key = f"{namespace}:index:{incarnation}"
        self._slots_key = f"{namespace}:slots"
        self._sweeper_key = f"{namespace}:sweeper"
        self._generation = ""
        self._slot = 0
        self._register = client.register_script(REGISTER)
        self._write = client.register_script(WRITE)
        self._leave = client.register_script(LEAVE)

    def enter(self, seq: int, known: bool = True) -> bool:
        """Renew the slot for a lease. `seq` is the last batch that was acknowledged; without `known` a new slot is
        wanted. True: the slot is new, and the index holds none of this worker's pages.
        """
        generation = self._generation if known else ""
        # The slots have to outlive every bucket that names them.
        ttl_ms = 2 * self._bucket_ttl_ms + self._lease_ms
        believed: list[str | int] = [generation, self._slot, seq]
        arguments: list[str | int] = [self._incarnation, self._lease_ms, ttl_ms, secrets.token_hex(4), *believed]
        answer: Any = self._register([self._key, self._slots_key], arguments)
        if not answer[2]:
            return False
        if self._generation:
            self.losses += 1
        if self._generation and known:
            log.warning("Redis has lost this worker's part of the prefix index: all pages are announced again")
        self._generation, self._slot = answer[0].decode(), int(answer[1])
        return True

    def write(self, batch: Batch) -> bool:
        """Write a batch. False: nothing was written, as the index misses an earlier batch or the lease has ended."""
        owner: list[str | int] = [self._namespace, self._generation, self._slot, batch.seq]
        arguments: list[str | int | bytes] = [*owner, self._bucket_ttl_ms, pack(batch.gone), pack(batch.held)]
        missing: Any = self._write([self._key], arguments)
        if batch.again and missing > 0:
            self.repaired += missing
            log.warning("the prefix index had lost %d of %d pages; they are there again", missing, len(batch.held))
        return bool(missing >= 0)

    def leave(self, announcements: Announcements) -> None:
        """Give the slot back; what is still announced is swept out by other workers, or expires."""
        removed = announcements.next() is None
        owner = f"{self._generation}:{self._slot}:{announcements.seq}" if removed else ""
        keys = [self._key, self._slots_key, self._sweeper_key]
        self._leave(keys, [self._incarnation, self._slot, owner])


class Sweeper:
    """Takes slots of workers that are gone out of all buckets, a piece at a time, so that they can be given again.

    One worker of a namespace looks for them and does it; another one takes over a lease after that one has died, from
    the beginning.
    """

    def __init__(self, client: redis.Redis, namespace: str, incarnation: str, lease_s: float) -> None:
        self._keys = [f"{namespace}:slots", f"{namespace}:sweeper"]
        self._me: list[str | int] = [namespace, incarnation, int(lease_s * 1000)]
        self._found: list[bytes] = []  # generation, then slot and incarnation of each that is swept out
        self._bucket = 0  # the next one
        self._begin = client.register_script(BEGIN_SWEEP)
        self._sweep = client.register_script(SWEEP)

    def begin(self) -> None:
        """Look for slots to sweep out, unless some are being swept out, or another worker is the one that does."""
        if not self._found:
            found: Any = self._begin(self._keys, self._me)
            self._found, self._bucket = found, 0

    def step(self) -> bool:
        """Sweep a piece. False: nothing is left to do."""
        if not self._found:
            return False
        answer: Any = self._sweep(self._keys, [*self._me, self._bucket, *self._found])
        if answer >= 1 << BUCKET_BITS:
            log.info("%d workers that are gone have been taken out of the prefix index", len(self._found) // 2)
        if answer < 0 or answer >= 1 << BUCKET_BITS:
            self._found = []
            return False
        self._bucket = answer
        return True
