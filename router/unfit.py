"""Workers that are listed and cannot be used, or not as they should be: each is told of once, and counted.

A link tries again and again and finds the same every time; service.py says so every time.
"""

from __future__ import annotations

import logging

from penstock.common.messages import WorkerInfo

log = logging.getLogger(__name__)


class Unfit:
    """Of one router, by address."""

    def __init__(self) -> None:
        self.counters = {"workers_refused": 0, "template_mismatches": 0}
        self._refused: dict[str, str] = {}  # the worker's incarnation, or the reason of one that did not say who it is
        self._suspected: dict[str, str] = {}  # the reason
        self._unreached: dict[str, str] = {}  # the reason
        self._warned: dict[str, str] = {}  # the worker's incarnation

    def __bool__(self) -> bool:
        """A worker is refused, or refuses us."""
        return bool(self._refused)

    def refuse(self, address: str, reason: str, worker: WorkerInfo | None = None) -> None:
        """Nothing is asked of it; `worker`: what it says of itself, if it let us in at all. One that did not is told of
        when it has done so twice: one that dies while it is met looks the same."""
        if worker is None and _is_new(self._suspected, address, reason):
            return
        if not _is_new(self._refused, address, worker.incarnation if worker else reason):
            return
        self.counters["workers_refused"] += 1
        name = f"worker {worker.worker_id} ({worker.role})" if worker else "the worker"
        log.error("%s at %s is not used: %s", name, address, reason)

    def miss(self, address: str, reason: str) -> None:
        """Nobody answers there: mostly one that died and is listed until its lease ends, so no more than news."""
        if _is_new(self._unreached, address, reason):
            log.info("nobody answers for the worker at %s: %s", address, reason)

    def warn(self, address: str, worker: WorkerInfo, warning: str) -> None:
        """It is used all the same."""
        if _is_new(self._warned, address, worker.incarnation):
            self.counters["template_mismatches"] += 1
            log.warning("worker %s (%s) at %s: %s", worker.worker_id, worker.role, address, warning)

    def accept(self, address: str) -> None:
        """It is used from now on."""
        self._refused.pop(address, None)
        self._suspected.pop(address, None)
        self._unreached.pop(address, None)

    def forget(self, address: str) -> None:
        """It is not listed any more."""
        self.accept(address)
        self._warned.pop(address, None)


def _is_new(told: dict[str, str], address: str, what: str) -> bool:
    new = told.get(address) != what
    told[address] = what
    return new
