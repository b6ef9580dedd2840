"""When the requests of `penstock bench serve` are sent. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import accumulate

STRATEGIES = ("linear", "exponential")


def arrivals(number: int, rate: float, burstiness: float, chooser: random.Random) -> list[float]:
    """Seconds after the start at which each of `number` requests is sent.

    The gaps are gamma-distributed with mean 1 / rate and shape `burstiness`: 1 is a Poisson process, below it requests
    come in bursts, above it they come more evenly, infinity is a steady beat. The last one is scaled to number / rate,
    as vLLM does, so that runs with different seeds load a server alike. An infinite rate sends all at once.

    Raises:
        ValueError: a rate or burstiness that is not above 0.
    """
    _check(rate, burstiness)
    if math.isinf(rate) or number == 0:
        return [0.0] * number
    times = _times([rate] * number, burstiness, chooser)
    scale = number / rate / times[-1] if times[-1] else 0.0
    return [time * scale for time in times]


def ramp_up(
    number: int, strategy: str, start: float, end: float, burstiness: float, chooser: random.Random
) -> list[float]:
    """As `arrivals`, at a rate that goes from `start` to `end` over the requests: by sums, or by factors (exponential).

    Raises:
        ValueError: an unknown strategy, a rate or burstiness that is not above 0, or start above end.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"the strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    _check(min(start, end), burstiness)
    if start > end or math.isinf(end):
        raise ValueError(f"the rates must rise to a finite one, got {start:g} and {end:g}")
    steps = [i / max(1, number - 1) for i in range(number)]
    rates = [start + (end - start) * x if strategy == "linear" else start * (end / start) ** x for x in steps]
    return _times(rates, burstiness, chooser)


def _check(rate: float, burstiness: float) -> None:
    if not (rate > 0 and burstiness > 0):
        raise ValueError(f"rate and burstiness must be above 0, got {rate:g} and {burstiness:g}")


def _times(rates: Sequence[float], burstiness: float, chooser: random.Random) -> list[float]:
    if math.isinf(burstiness):
        return list(accumulate(1.0 / rate for rate in rates))
    return list(accumulate(chooser.gammavariate(burstiness, 1.0 / (rate * burstiness)) for rate in rates))
