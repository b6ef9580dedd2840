"""`penstock prefill`: a worker that computes prompts and hands their pages to decode workers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from penstock.common.config import WorkerConfig
from penstock.engine.kv_pool import KVPool
from penstock.engine.policy import BatchPolicy, PrefillPolicy
from penstock.engine.worker_loop import Role, WorkerLoop
from penstock.engine.worker_process import run_worker
from penstock.kv_transfer.base import Transport
from penstock.kv_transfer.exchange import open_exchange
from penstock.kv_transfer.select import open_transports
from penstock.prefill_worker.handoff import HandOffOut


class PrefillJoint:
    """Joins engine and page exchange into the prefill role."""

    def __init__(self, config: WorkerConfig) -> None:
        self.policy: BatchPolicy = PrefillPolicy()
        self._config = config
        self._pool: KVPool | None = None
        self._transports: Sequence[Transport] = ()

    def open_transports(self, pool: KVPool, incarnation: str) -> dict[str, bytes]:
        self._pool = pool
        self._transports = open_transports(self._config.kv_transport, pool.region(), incarnation)
        return {transport.name: transport.description() for transport in self._transports}

    def make_role(self, loop: WorkerLoop) -> Role:
        assert self._pool is not None, "open_transports comes first"
        exchange = open_exchange(
            self._config,
            loop.info,
            loop.engine.pages,
            self._pool.region(),
            self._transports,
            checksum=self._pool.checksum(),
            wake=loop.wake,
            poller=loop.poller,
            send=loop.bus.send,
            heartbeat_seq=loop.peers.heartbeat_seq,
            rates=loop.engine.rates,
        )
        return HandOffOut(loop, exchange, time.monotonic)


def main(config: WorkerConfig) -> None:
    """Run a prefill worker until it is told to stop; raises as `run_worker`."""
    run_worker(config, PrefillJoint(config))
