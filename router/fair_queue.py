"""Requests that wait at the router while the fleet is full: by priority, then in fair shares between API keys. Pure.

Start-time fair queueing: a request of a tenant gets a finish time on a virtual clock, its cost / the tenant's weight
behind the tenant's last one, and the earliest goes first. So a tenant that asks for ten times as much waits for itself,
not others for it; one alone gets everything, and nobody saves up shares by being away. Deficit round robin shares
alike; here the order is one sorted list, so what stands before a request, and who is the furthest beyond its share,
can be read off it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
FEW = 64


@dataclass(frozen=True, order=True)
class Place(Generic[Item]):
    """Where somebody stands. `priority`: lower ones go first."""

    priority: int
    finish: float
    number: int  # of arrival
    start: float = field(compare=False)
    cost: float = field(compare=False)
    tenant: str = field(compare=False)
    key: Hashable = field(compare=False)
    item: Item = field(compare=False)


class FairQueue(Generic[Item]):
    """`weights` by tenant; those that are not named weigh 1."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        if any(weight <= 0 for weight in self._weights.values()):
            raise ValueError(f"weights must be above 0, got {self._weights}")
        self._order: list[Place[Item]] = []
        self._places: dict[Hashable, Place[Item]] = {}
        self._cost = 0.0  # of all
        self._now: dict[int, float] = {}  # by priority: virtual time
        self._last: dict[tuple[int, str], float] = {}  # by priority and tenant: finish of its last request
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def place(self, key: Hashable, tenant: str, priority: int, cost: float, item: Item) -> Place[Item]:
        """Where a newcomer would stand; nothing changes."""
        begin = max(self._now.get(priority, 0.0), self._last.get((priority, tenant), 0.0))
        finish = begin + cost / self._weights.get(tenant, 1.0)
        return Place(priority, finish, next(self._numbers), begin, cost, tenant, key, item)

    def push(self, place: Place[Item]) -> None:
        """Stand there: a newcomer, or one that was taken out and has to wait on.

        Raises:
            ValueError: the key stands in the queue.
        """
        if place.key in self._places:
            raise ValueError(f"{place.key} waits already")
        self._places[place.key] = place
        insort(self._order, place)
        self._cost += place.cost
        last = (place.priority, place.tenant)
        self._last[last] = max(self._last.get(last, 0.0), place.finish)
        if len(self._last) > 2 * len(self._order) + FEW:  # a queue that is never empty
            self._forget()

    def ahead(self, place: Place[Item]) -> float:
        """The cost of all that goes before."""
        at = bisect_left(self._order, place)
        if at > len(self._order) // 2:  # most come last: a hundred thousand prompts of one program, each of which asks
            return self._cost - sum(other.cost for other in self._order[at:])
        return sum(other.cost for other in self._order[:at])

    def pop(self) -> Place[Item] | None:
        """Who is next."""
        if not self._order:
            return None
        first = self._order[0]
        self._take(first)
        self._now[first.priority] = max(self._now.get(first.priority, 0.0), first.start)
        return first

    def pop_last(self) -> Place[Item]:
        """Who has to go if there is one too many: the newest of the tenant furthest beyond its share, of the least
        urgent ones."""
        last = self._order[-1]
        self._take(last)
        self._last[last.priority, last.tenant] = last.start
        return last

    def remove(self, key: Hashable) -> bool:
        """Somebody waits no longer; False: it did not."""
        place = self._places.get(key)
        if place is not None:
            self._take(place)
        return place is not None

    def _forget(self) -> None:
        """Priorities that nobody waits with begin anew, and tenants that have had no more than their share."""
        waiting = {place.priority for place in self._order}
        self._now = {priority: now for priority, now in self._now.items() if priority in waiting}
        self._last = {
            (priority, tenant): finish
            for (priority, tenant), finish in self._last.items()
            if priority in waiting and finish > self._now.get(priority, 0.0)
        }

    def _take(self, place: Place[Item]) -> None:
        del self._places[place.key]
        del self._order[bisect_left(self._order, place)]
        self._cost -= place.cost
        if not self._order:  # all begin anew
            self._cost = 0.0
            self._now.clear()
            self._last.clear()
