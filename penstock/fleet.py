"""A whole fleet on this machine: Redis, workers and router as child processes, supervised from a background thread.

    with Fleet(ServeConfig(model="path", prefill_workers=1)) as fleet:
        OpenAI(base_url=fleet.url + "/v1")          # ready when the block begins, gone when it ends

`penstock serve` is this plus signals (launcher.py); tests, the demo and the benchmarks use it directly.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Any

from penstock.child_process import ProcessSpec
from penstock.common.config import FleetConfig, ServeConfig
from penstock.common.cores import available_cores
from penstock.common.errors import ConfigError
from penstock.common.messages import WorkerInfo
from penstock.console import Console
from penstock.own_process import own_process
from penstock.placement import Placement, place_workers, visible_gpus
from penstock.private_redis import PrivateRedis, free_port, port_is_free
from penstock.process_group import ProcessGroup
from penstock.router_specs import SHUTDOWN_GRACE_S, reachable_address, router_specs
from penstock.supervisor import Member

# For a fleet with one user, who means all that is asked: a request may wait behind all others, however many and long.
# Workers that die are noticed by their leases.
WITHOUT_LIMITS: Mapping[str, Any] = MappingProxyType(
    {"max_inflight": 1 << 20, "max_queued": 1 << 20, "queue_timeout_s": 1e9, "progress_timeout_s": 1e9}
)


class Fleet:
    """The fleet that `config` describes. Nothing runs before `start` (or the `with` block).

    Args:
        config: `port` 0 takes any free one; without `redis_url` the fleet has its own Redis.
        console: where the children's lines and progress go; default: stderr.
        with_router: without, the caller has a router of its own.

    Raises:
        ConfigError: no model, no redis-server, or the port is in use.
    """

    def __init__(self, config: ServeConfig, *, console: Console | None = None, with_router: bool = True) -> None:
        if not config.model:
            raise ConfigError("MODEL is missing: a Hugging Face directory or hub id")
        if config.port and not port_is_free(config.host, config.port):
            raise ConfigError(
                f"cannot listen on {config.host} port {config.port}: it is in use, or not an address here"
            )
        private_redis = None if config.redis_url else PrivateRedis()
        self.config = replace(
            config,
            port=config.port or free_port(config.host),
            redis_url=private_redis.url if private_redis else config.redis_url,
        )
        self.placements = place_workers(config, visible_gpus(os.environ), available_cores())
        self.specs = [private_redis.spec()] if private_redis else []
        self.specs += [self._worker_spec(placement) for placement in self.placements]
        if with_router:
            counts = {"prefill": config.prefill_workers, "decode": config.decode_workers}
            self.specs += router_specs(self.config.router(), counts)
        self._group = ProcessGroup(self.specs, console or Console(json_lines=config.log_format == "json"))

    def __enter__(self) -> Fleet:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """http://host:port of the router, without /v1."""
        return f"http://{reachable_address(self.config.host, self.config.port)}"

    @property
    def group(self) -> ProcessGroup:
        """The processes."""
        return self._group

    def start(self) -> None:
        """Begin to start everything."""
        self._group.start()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the router is linked to every worker. Raises as `ProcessGroup.wait_ready`."""
        self._group.wait_ready(timeout_s)

    def stop(self) -> None:
        """Drain and stop: router, workers, Redis. Returns when no process is left."""
        self._group.stop()
        self._group.join()

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process ("decode-0", "router", "redis"); the supervisor starts it again if it dies."""
        self._group.send(name, number)

    def worker_pids(self) -> dict[str, int]:
        """Process ids of the running workers, by worker id."""
        worker_ids = {placement.worker_id for placement in self.placements}
        return {name: pid for name, pid in self._group.pids().items() if name in worker_ids}

    def workers(self) -> dict[str, WorkerInfo]:
        """The running workers as registered in Redis, by worker id; not those that are still loading."""
        return _of_these(_registered(self.config), self.worker_pids())

    def status_urls(self) -> dict[str, str]:
        """Address of each registered worker's /health, /metrics and /debug/ledger."""
        return {worker_id: worker.status_url for worker_id, worker in self.workers().items()}

    def _worker_spec(self, placement: Placement) -> ProcessSpec:
        config = placement.config(self.config)
        # OMP_NUM_THREADS is read when the OpenMP library is loaded.
        environ = {"OMP_NUM_THREADS": str(placement.cpu_threads)} if placement.device == "cpu" else {}
        return own_process(
            Member(placement.worker_id, tier=1, drain_s=config.drain_s + SHUTDOWN_GRACE_S),
            placement.role,
            config,
            lambda pid: placement.worker_id in _of_these(_registered(config), {placement.worker_id: pid}),
            environ,
        )


def _registered(config: FleetConfig) -> list[WorkerInfo]:
    """Workers in Redis; none while it is away."""
    from penstock.common.redis_state import FleetReader

    async def read() -> list[WorkerInfo]:
        # Asked several times a second while a worker starts: what is wrong, routers and workers say, and once.
        reader = FleetReader(config.redis_url, config.namespace, "launcher", logging.DEBUG)
        try:
            return await reader.workers() or []
        finally:
            await reader.close()

    with ThreadPoolExecutor(1) as thread:  # the caller's own thread may be running an event loop
        return thread.submit(asyncio.run, read()).result()


def _of_these(workers: list[WorkerInfo], pids: dict[str, int]) -> dict[str, WorkerInfo]:
    """Those of our processes; a record of a dead predecessor (another pid) may last for a lease."""
    return {worker.worker_id: worker for worker in workers if pids.get(worker.worker_id) == worker.pid}
