"""benchmarks/soak.py for two minutes: the whole plan, faster; and that its trend tells growth from noise."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.soak import PLAN, run, trend

MINUTES, RATE = 2.0, 4.0


def test_trend_tells_growth_from_noise() -> None:
    chooser = random.Random(3)
    still = [(float(i), 5e7 + chooser.gauss(0, 1e5)) for i in range(600)]
    growing = [(at, value + 2e3 * at) for at, value in still]  # 2 kB a second: 117 KiB a minute
    flat, rising = trend(still), trend(growing)
    assert flat is not None and rising is not None
    assert not flat.grows and rising.grows
    assert abs(rising.kib_per_minute - flat.kib_per_minute - 2e3 * 60 / 1024) < 0.1
    assert trend(still[:50]) is None


def test_memory_that_wanders_does_not_grow() -> None:
    """Blocks that follow each other are alike; taken for independent, one walk in three would look like growth."""
    grows = 0
    for seed in range(100):
        chooser, at, walk = random.Random(seed), 5e7, []
        for i in range(600):
            at += 0.01 * (5e7 - at) + chooser.gauss(0, 1e4)
            walk.append((float(i), at))
        found = trend(walk)
        grows += found is not None and found.grows
    assert grows < 12


@pytest.mark.system
@pytest.mark.timeout(600)
def test_a_fleet_in_which_everything_comes_and_goes_loses_nothing(tmp_path: Path) -> None:
    result = run(MINUTES, RATE, tmp_path)
    assert [action for _, action in result["events"]] == [action for _, action in PLAN]
    assert result["exact"] > 0.8 * result["requests"] > 0, result
    assert result["predicted_hit_tokens"] > 0
