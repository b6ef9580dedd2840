"""`penstock decode`: a worker that generates; prompts come from prefill workers, or are computed here."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.common.config import WorkerConfig
from penstock.decode_worker.handoff import HandOffIn
from penstock.decode_worker.prefill_links import PrefillLinks
from penstock.decode_worker.role import DecodeRole
from penstock.engine.kv_pool import KVPool
from penstock.engine.policy import BatchPolicy, DecodePolicy
from penstock.engine.worker_loop import Role, WorkerLoop
from penstock.engine.worker_process import run_worker
from penstock.kv_transfer.base import Transport
from penstock.kv_transfer.leases import Landings
from penstock.kv_transfer.mover import PageMover
from penstock.kv_transfer.select import open_transports


class DecodeJoint:
    """Joins engine, mover, links and landings into the decode role."""

    def __init__(self, config: WorkerConfig) -> None:
        self.policy: BatchPolicy = DecodePolicy()
        self._config = config
        self._pool: KVPool | None = None
        self._transports: Sequence[Transport] = ()

    def open_transports(self, pool: KVPool, incarnation: str) -> dict[str, bytes]:
        self._pool = pool
        self._transports = open_transports(self._config.kv_transport, pool.region(), incarnation)
        return {transport.name: transport.description() for transport in self._transports}

    def make_role(self, loop: WorkerLoop) -> Role:
        assert self._pool is not None, "open_transports comes first"
        config = self._config
        links = PrefillLinks(
            loop.info.incarnation, loop.info.fingerprint, config.cluster_key, config.lease_s, loop.poller
        )
        handoffs = HandOffIn(
            pages=loop.engine.pages,
            mover=PageMover(self._pool.region(), self._transports, loop.wake, checksum=self._pool.checksum()),
            links=links,
            landings=Landings(config.lease_s),
            own_transports=[transport.name for transport in self._transports],
            kv_transport=config.kv_transport,
            rates=loop.engine.rates,
        )
        return DecodeRole(loop, handoffs)


def main(config: WorkerConfig) -> None:
    """Run a decode worker until it is told to stop; raises as `run_worker`."""
    run_worker(config, DecodeJoint(config))
