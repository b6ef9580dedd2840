"""When the requests of `penstock bench serve` are sent. Pure."""

from __future__ import annotations

import math
import random
from itertools import accumulate


def arrivals(number: int, rate: float, burstiness: float, chooser: random.Random) -> list[float]:
    """Seconds after the start at which each of `number` requests is sent.

    The gaps are gamma-distributed with mean 1 / rate and shape `burstiness`: 1 is a Poisson process, below it requests
    come in bursts, above it they come more evenly, infinity is a steady beat. The last one is scaled to number / rate,
    as vLLM does, so that runs with different seeds load a server alike. An infinite rate sends all at once.

    Raises:
        ValueError: a rate or burstiness that is not above 0.
    """
    if not (rate > 0 and burstiness > 0):
        raise ValueError(f"rate and burstiness must be above 0, got {rate:g} and {burstiness:g}")
    if math.isinf(rate) or number == 0:
        return [0.0] * number
    if math.isinf(burstiness):
        gaps = [1.0 / rate] * number
    else:
        gaps = [chooser.gammavariate(burstiness, 1.0 / (rate * burstiness)) for _ in range(number)]
    times = list(accumulate(gaps))
    scale = number / rate / times[-1] if times[-1] else 0.0
    return [time * scale for time in times]
