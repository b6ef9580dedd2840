"""Least squares over a stream: coefficients, none below 0, of y = c . x, in which older observations count less. Pure.

Workers estimate their own speed with it (common/rate_estimator.py). The normal equations are kept, not the points, so
an observation costs the same whatever came before. Features that always occur together cannot be told apart: small
ridges then divide what they take among them, most to the least, and what is predicted of such points is right all the
same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RIDGE = 1e-6  # of a feature's own sum of squares
_WILD = 4.0  # a value so many times what was expected counts as only so much: a stopped process is not a slow one


class LeastSquares:
    """`num_features` features; an observation weighs half after `half_life` more. `ridges`: a feature's each."""

    def __init__(self, num_features: int, half_life: float, ridges: Sequence[float] = ()) -> None:
        self._size = num_features
        self._ridges = ridges or (RIDGE,) * num_features
        self._keep = math.exp(-math.log(2) / half_life)
        self._products = [[0.0] * num_features for _ in range(num_features)]  # sum of x x^T, the lower triangle
        self._targets = [0.0] * num_features  # sum of x y
        self._coefficients: list[float] | None = None
        self.observations = 0

    def observe(self, x: Sequence[float], y: float) -> None:
        """One more point.

        Raises:
            ValueError: a number is not finite, or `x` has another length.
        """
        if len(x) != self._size or not all(map(math.isfinite, (*x, y))):
            raise ValueError(f"not a point of {self._size} features: {x}, {y}")
        if self._coefficients is not None:
            expected = sum(c * a for c, a in zip(self._coefficients, x, strict=True))
            if expected > 0:
                y = min(y, _WILD * expected)
        keep, targets = self._keep, self._targets
        for i, row in enumerate(self._products):
            a = x[i]
            for j in range(i + 1):
                row[j] = row[j] * keep + a * x[j]
            targets[i] = targets[i] * keep + a * y
        self.observations += 1

    def solve(self) -> list[float]:
        """The coefficients as of now, all of them 0 or more; what is wild is judged by them from now on."""
        free = [i for i in range(self._size) if self._products[i][i] > 0]
        while True:
            found = self._solve(free)
            kept = [i for i in free if found[i] > 0]
            if len(kept) == len(free):
                self._coefficients = found
                return list(found)
            free = kept  # what came out below 0 takes no part: the others are fitted again without it

    def _solve(self, free: Sequence[int]) -> list[float]:
        """Cholesky's method over the features that take part, each scaled to a mean square of 1."""
        scales = [math.sqrt(self._products[i][i]) for i in free]
        lower: list[list[float]] = []
        known: list[float] = []
        for a, i in enumerate(free):
            row: list[float] = []
            for b in range(a + 1):
                value = self._products[i][free[b]] / (scales[a] * scales[b])
                value -= sum(row[k] * lower[b][k] for k in range(b)) if b < a else sum(v * v for v in row)
                row.append(value / lower[b][b] if b < a else math.sqrt(max(value + self._ridges[i], RIDGE)))
            lower.append(row)
            rest = self._targets[i] / scales[a] - sum(row[k] * known[k] for k in range(a))
            known.append(rest / row[a])
        solved = [0.0] * len(free)
        for a in reversed(range(len(free))):
            above = sum(lower[c][a] * solved[c] for c in range(a + 1, len(free)))
            solved[a] = (known[a] - above) / lower[a][a]
        found = [0.0] * self._size
        for a, i in enumerate(free):
            found[i] = solved[a] / scales[a]
        return found
