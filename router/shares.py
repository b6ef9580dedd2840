"""How much work each worker has been given, so that over time all get as much. Pure.

Queues alone do not balance a fleet that is not full: whoever happens to be idle looks alike, however much it has done,
and prefixes pull the same requests to the same workers. So work given counts a little too. Only differences mean
anything. Who joins starts at the mean, and nobody is owed more than `MOST_OWED_MS`: a worker that could not be used for
a while is not flooded afterwards.
"""

from __future__ import annotations

from collections.abc import Container

MOST_OWED_MS = 60_000.0


class WorkShares:
    """Milliseconds of work by worker."""

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._total = 0.0

    def join(self, incarnation: str) -> None:
        """A worker takes part from now on; one that does already stays as it is."""
        if incarnation not in self._given:
            mean_ms = self._mean_ms()
            self._given[incarnation] = mean_ms
            self._total += mean_ms

    def keep(self, incarnations: Container[str]) -> None:
        """Nobody but these takes part any more."""
        for gone in [incarnation for incarnation in self._given if incarnation not in incarnations]:
            self._total -= self._given.pop(gone)
        if not self._given:
            self._total = 0.0

    def give(self, incarnation: str, work_ms: float) -> None:
        """More work (or less: what was given has turned out smaller); unknown workers do nothing."""
        if incarnation in self._given:
            given_ms = self.of(incarnation) + work_ms
            self._total += given_ms - self._given[incarnation]
            self._given[incarnation] = given_ms

    def of(self, incarnation: str) -> float:
        """Work given to a worker that takes part, to be compared with others' only."""
        return max(self._given[incarnation], self._mean_ms() - MOST_OWED_MS)

    def _mean_ms(self) -> float:
        return self._total / len(self._given) if self._given else 0.0
