"""A histogram in plain Python, for figures that are counted where a `prometheus_client` one would be too slow or far.

Counted by one thread with one bisect an observation; what a worker counts travels as a list in its `WorkerLoad`, and
becomes a metric family wherever it is shown (worker_metrics.py, router/metrics.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

# Upper bounds of the histograms that workers count. Source: vLLM 0.22.1.
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
READ_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
READ_BYTES = tuple(2**power for power in range(11, 35, 2))
READ_PAGES = (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000)
LOOKUP_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)  # of the prefix index


class Histogram:
    """Counts by upper bound. `counts[i]` are the values in (bounds[i - 1], bounds[i]]; the last has no bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def packed(self) -> list[float]:
        """The counts and, last, the sum of all values: as it travels."""
        return [*self.counts, self.total]

    @classmethod
    def unpacked(cls, bounds: Sequence[float], packed: Sequence[float]) -> Histogram:
        """What `packed` was made of; an empty one for [] and for another version's bounds."""
        histogram = cls(bounds)
        if len(packed) == len(bounds) + 2:
            histogram.counts, histogram.total = [int(count) for count in packed[:-1]], packed[-1]
        return histogram
