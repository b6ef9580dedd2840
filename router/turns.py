"""Whose turn it is: carries out what admission decides. Driven by the service; the dispatcher gets what comes of it.

A request that the dispatcher wants placed gets its workers from placing.py; then it goes, is refused, or waits here
while the fleet is full. Decisions are pure, in admission.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from penstock.common.config import RouterConfig
from penstock.common.errors import PenstockError
from penstock.common.logs import about
from penstock.router.admission import Admission, Limits
from penstock.router.dispatch_events import Event, Place, Placed, PlaceFailed, Queued, Refused
from penstock.router.expected import Expected
from penstock.router.fleet import Fleet
from penstock.router.hit_check import HitCheck
from penstock.router.placing import Found, Placing
from penstock.router.policy import EXPECTED_OUTPUT_TOKENS

log = logging.getLogger(__name__)


def new_admission(config: RouterConfig) -> Admission[Place]:
    """Admission as a router is configured."""
    limits = Limits(config.slo_ttft, config.slo_tpot, config.own_max_queued, config.queue_timeout_s)
    return Admission(limits, config.weights_by_tenant)


class Turns:
    """One router's. All methods belong to its event loop; `emit` takes events of the dispatcher, at once."""

    def __init__(
        self,
        placing: Placing,
        fleet: Fleet,
        hits: HitCheck,
        admission: Admission[Place],
        emit: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
    ) -> None:
        self._placing, self._fleet, self._hits = placing, fleet, hits
        self._admission = admission
        self._emit, self._spawn = emit, spawn
        self._turn: tuple[str, int] | None = None  # whose turn is being looked at
        self._looking = False

    async def place(self, command: Place) -> None:
        """Answer a `Place` of the dispatcher. A request that has begun already is not refused, and does not wait."""
        found = await self._find(command)
        if found is None:
            return
        try:
            goes = command.request.attempt > 0 or found.expected is None or self._goes(command, found.expected)
        except Exception:
            self._failed(command)
            return
        if goes:
            self._go(command, found)

    def _goes(self, command: Place, expected: Expected) -> bool:
        """Whether it is sent at once; else it is refused, or waits."""
        waits = len(self._admission) > 0
        verdict = False if waits else self._admission.judge(expected, _waited_ms(command))
        if verdict is False:
            self._enqueue(command, expected)
        elif isinstance(verdict, PenstockError):
            self._emit(Refused(*_key(command), verdict))
        return verdict is True

    def take(self) -> None:
        """Something has changed: whoever waits may have room now."""
        if len(self._admission) and not self._looking:
            self._looking = True
            self._spawn(self._take(), "take turns")

    def forget(self, key: tuple[str, int]) -> None:
        """A request that waited has ended."""
        self._admission.forget(key)
        if self._turn == key:
            self._turn = None

    async def _take(self) -> None:
        try:
            while (place := self._admission.next()) is not None:
                command = place.item
                self._turn = _key(command)
                found = await self._find(command)
                if found is None or self._turn is None:  # a bug of ours, or it was cancelled meanwhile
                    continue
                verdict: PenstockError | bool = True
                if found.expected is not None:
                    verdict = self._admission.judge(found.expected, _waited_ms(command))
                if verdict is False:
                    self._admission.back(place)
                    return
                self._admission.went(place, time.monotonic())
                if isinstance(verdict, PenstockError):
                    self._emit(Refused(*_key(command), verdict))
                else:
                    self._go(command, found)
        finally:
            self._turn = None
            self._looking = False

    async def _find(self, command: Place) -> Found | None:
        """Workers for it; None: that failed, and was answered."""
        request = command.request
        try:
            return await self._placing.place(request, command.avoid, command.since, command.moving)
        except Exception:
            self._failed(command)
            return None

    def _failed(self, command: Place) -> None:
        """By a bug, but one that must not leave the client waiting."""
        request = command.request
        log.exception("a request could not be placed", extra=about(request))
        self._emit(PlaceFailed(request.request_id, request.choice, request.attempt))

    def _enqueue(self, command: Place, expected: Expected) -> None:
        request = command.request
        cost = len(request.prompt_token_ids) + min(request.sampling.max_tokens or 1 << 30, EXPECTED_OUTPUT_TOKENS)
        capacity, now = self._placing.prefill_rate(), time.monotonic()
        refused = self._admission.enqueue(
            _key(command), command.tenant, request.priority, cost, command, expected, capacity, now
        )
        if not any(place.item is command for place, _ in refused):
            self._emit(Queued(*_key(command)))
        for place, error in refused:
            self._emit(Refused(*_key(place.item), error))

    def _go(self, command: Place, found: Found) -> None:
        """Hand the choice over in the same breath: no await between."""
        request, placement = command.request, found.placement
        if placement is not None:
            self._fleet.give(placement, time.monotonic())
            worker = placement.prefill or placement.decode
            lookup = found.lookups.get(worker.incarnation)
            if lookup is not None and placement.source is None:  # else nothing is known, or pages come first
                tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
                pages = lookup.held_pages
                self._hits.predicted(_key(command), request.attempt, worker.worker_id, pages, worker.page_size, tokens)
        self._emit(Placed(request.request_id, request.choice, request.attempt, placement))


def _key(command: Place) -> tuple[str, int]:
    return command.request.request_id, command.request.choice


def _waited_ms(command: Place) -> float:
    return (time.monotonic() - command.since) * 1e3
