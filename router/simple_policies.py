"""Routing policies that look at one thing only: what the cost policy is compared with, and what some fleets want."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from penstock.router.policy import Candidate, PickingPolicy, RequestFacts


class RandomPolicy(PickingPolicy):
    """Any worker, all with the same chance."""

    name: ClassVar[str] = "random"
    sees_all: ClassVar[bool] = True

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def pick(self, facts: RequestFacts, workers: Sequence[Candidate]) -> Candidate:
        return workers[int(self._random.random() * len(workers))]


class RoundRobinPolicy(PickingPolicy):
    """Each worker in turn, in the order in which they are given; each role has its own turns."""

    name: ClassVar[str] = "round-robin"
    sees_all: ClassVar[bool] = True

    def __init__(self) -> None:
        self._turns: Counter[str] = Counter()

    def pick(self, facts: RequestFacts, workers: Sequence[Candidate]) -> Candidate:
        role = workers[0].worker.role
        turn = self._turns[role]
        self._turns[role] = turn + 1
        return workers[turn % len(workers)]


class LeastLoadPolicy(PickingPolicy):
    """Whoever has least to compute before this request; of equals, who runs fewer sequences."""

    name: ClassVar[str] = "least-load"

    def pick(self, facts: RequestFacts, workers: Sequence[Candidate]) -> Candidate:
        return min(workers, key=lambda c: (self.load(c), c.worker.worker_id))


class LongestPrefixPolicy(PickingPolicy):
    """Whoever holds most of the prompt, whatever waits there; the least loaded of equals."""

    name: ClassVar[str] = "longest-prefix"

    def pick(self, facts: RequestFacts, workers: Sequence[Candidate]) -> Candidate:
        return min(workers, key=lambda c: (-min(c.held_tokens, facts.num_tokens), self.load(c), c.worker.worker_id))
