"""What both workers' processes do to move pages: open transports over the pool, and the exchange beside the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Any, Generic, Protocol, TypeVar

from penstock.common.bus_access import resolve_bind
from penstock.common.config import WorkerConfig
from penstock.common.errors import ConfigError
from penstock.common.memory import MemoryRegion
from penstock.common.messages import WorkerInfo
from penstock.kv_transfer.base import Transport, TransportError
from penstock.kv_transfer.exchange import PageExchange, open_exchange
from penstock.kv_transfer.select import close_transports, open_transports
from penstock.kv_transfer.tcp import Listen


class Pool(Protocol):
    """engine/kv_pool.py, as far as it is needed here."""

    def region(self) -> MemoryRegion: ...
    def checksum(self) -> Callable[[Sequence[int]], list[int]]: ...


class Loop(Protocol):
    """engine/worker_loop.py, as far as it is needed here."""

    info: WorkerInfo
    engine: Any
    bus: Any
    poller: Any

    def wake(self) -> None: ...


PolicyT = TypeVar("PolicyT")
LoopT = TypeVar("LoopT", bound=Loop)
RoleT = TypeVar("RoleT")


class ExchangeJoint(Generic[PolicyT, LoopT, RoleT]):
    """Joins the engine and a page exchange into a role (`Joint` of engine/worker_process.py)."""

    def __init__(
        self, config: WorkerConfig, policy: PolicyT, make_role: Callable[[LoopT, PageExchange], RoleT]
    ) -> None:
        self.policy = policy
        self._config = config
        self._make_role = make_role
        self._pool: Pool | None = None
        self._transports: Sequence[Transport] = ()

    def open_transports(self, pool: Pool, incarnation: str) -> dict[str, bytes]:
        """Open what moves pages between pools; name -> how a peer reads ours.

        Raises:
            ConfigError: what is asked for does not work here, nothing does, or peers could not reach the address.
        """
        self._pool, config = pool, self._config
        bind, announced = (address.strip("[]") for address in resolve_bind(config.bus_host, config.cluster_key))
        if not ip_address(bind).is_unspecified:
            announced = bind  # the bus may announce a name; names are not looked up between two copies
        listen = Listen(bind, config.kv_port, announced)
        try:
            self._transports = open_transports(config.kv_transport, pool.region(), incarnation, listen)
        except TransportError as error:
            raise ConfigError(f"kv_transport {config.kv_transport}: {error}") from error
        return {transport.name: transport.description() for transport in self._transports}

    def close_transports(self) -> None:
        """Where the start ends before `make_role`, whose role closes them."""
        close_transports(self._transports)

    def make_role(self, loop: LoopT) -> RoleT:
        """The role that drives the loop, with an exchange over the transports that were opened."""
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
            rates=loop.engine.rates,
        )
        return self._make_role(loop, exchange)
