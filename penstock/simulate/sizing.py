"""How large a fleet has to be: the smallest one that serves enough requests within the objectives. Pure.

One phase and two are searched apart. More workers are taken to serve no fewer requests; of two phases, so is a split
that is nearer to the best one of its size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from penstock.simulate.result import PolicyResult

Attempt = Callable[[int, int], PolicyResult]  # (workers, of them prefill workers) -> how the fleet fares


@dataclass(frozen=True)
class Sized:
    """A fleet, and how it fares."""

    workers: int
    prefill_workers: int
    result: PolicyResult


def one_phase(attempt: Attempt, most: int, share: float) -> Sized | None:
    """The fewest workers, up to `most`, that serve `share` of the requests within both objectives; None: too few."""
    return _fewest(lambda workers: Sized(workers, 0, attempt(workers, 0)), 1, most, share)


def two_phases(attempt: Attempt, most: int, share: float, prefill_share: float) -> Sized | None:
    """The same, some of them prefill workers; `prefill_share` is about how much of the work is prompts'."""

    def split(workers: int) -> Sized:
        return _best_split(attempt, workers, round(workers * prefill_share), share)

    return _fewest(split, 2, most, share)


def _fewest(sized: Callable[[int], Sized], least: int, most: int, share: float) -> Sized | None:
    """By bisection from below: small fleets are found without a look at large ones."""
    found, beyond = None, least  # fleets below `least` do not suffice; `found` does
    while least <= most and found is None:
        tried = sized(min(beyond, most))
        if tried.result.slo_attainment >= share:
            found = tried
        else:
            least, beyond = min(beyond, most) + 1, 2 * beyond
    while found is not None and least < found.workers:
        tried = sized((least + found.workers) // 2)
        if tried.result.slo_attainment >= share:
            found = tried
        else:
            least = tried.workers + 1
    return found


def _best_split(attempt: Attempt, workers: int, prefill_workers: int, share: float) -> Sized:
    """Uphill from a first guess; whatever suffices will do."""

    @functools.cache
    def tried(number: int) -> Sized:
        return Sized(workers, number, attempt(workers, number))

    best = tried(min(max(prefill_workers, 1), workers - 1))
    while best.result.slo_attainment < share:
        beside = [n for n in (best.prefill_workers - 1, best.prefill_workers + 1) if 0 < n < workers]
        better = max([best, *map(tried, beside)], key=lambda one: one.result.slo_attainment)
        if better is best:
            break
        best = better
    return best
