"""Which transport each peer's pages are read with. Pure bookkeeping; the reader connects what is chosen here."""

from __future__ import annotations

import logging

from penstock.common.messages import WorkerInfo
from penstock.kv_transfer.base import TransportError
from penstock.kv_transfer.select import choose, same_host

logger = logging.getLogger(__name__)


class PeerTransports:
    """By incarnation: `chosen` transports, and why a peer is `unreadable`.

    `own` are the transports open here, best first; `setting` is as configured: "auto" or one name.
    """

    def __init__(self, own: list[str], setting: str) -> None:
        self.chosen: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self._own = own
        self._setting = setting
        self._found: dict[str, WorkerInfo] = {}
        self._refused: dict[str, dict[str, str]] = {}  # transport -> why it did not open

    def find(self, worker: WorkerInfo) -> str:
        """Choose the transport, of those that have not been refused; "": there is none, see `unreadable`."""
        incarnation = worker.incarnation
        self._found[incarnation] = worker
        refused = self._refused.get(incarnation, {})
        offered = {n: d for n, d in worker.transports.items() if self._setting in ("auto", n) and n not in refused}
        try:
            transport = choose(self._own, offered, same_host(worker.transports))
        except TransportError as error:
            self.unreadable[incarnation] = "; ".join(f"{name}: {why}" for name, why in refused.items()) or str(error)
            return ""
        self.chosen[incarnation] = transport
        logger.info("reading pages of %s over %s", worker.worker_id, transport)
        return transport

    def refuse(self, incarnation: str, transport: str, reason: str) -> WorkerInfo | None:
        """This transport does not open. Returns the peer, to be found again over another, while it is linked."""
        worker = self._found.get(incarnation)
        if worker is not None:
            self.chosen.pop(incarnation, None)
            self._refused.setdefault(incarnation, {})[transport] = reason
        return worker

    def by_worker(self) -> dict[str, str]:
        """What each peer is read with, as in `WorkerLoad`."""
        return {self._found[incarnation].worker_id: transport for incarnation, transport in self.chosen.items()}

    def forget(self, incarnation: str) -> bool:
        """The link is lost, a new one is a new try. Returns whether a transport was connected."""
        self.unreadable.pop(incarnation, None)
        self._found.pop(incarnation, None)
        self._refused.pop(incarnation, None)
        return self.chosen.pop(incarnation, None) is not None
