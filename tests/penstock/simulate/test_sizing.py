"""The smallest fleet that suffices: the search against looking at all fleets, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cli import main
from penstock.simulate.result import PolicyResult
from penstock.simulate.sizing import Sized, one_phase, two_phases

NOTHING = PolicyResult("cost", *[0] * (len(dataclasses.fields(PolicyResult)) - 1))


class Fleets:
    """As many requests within the objectives as the scarcer role has workers for; counts the attempts."""

    def __init__(self, prompts: float, outputs: float) -> None:
        self._prompts, self._outputs = prompts, outputs  # workers that each needs
        self.tried: list[tuple[int, int]] = []

    def __call__(self, workers: int, prefill_workers: int) -> PolicyResult:
        self.tried.append((workers, prefill_workers))
        if prefill_workers:
            served = min(prefill_workers / self._prompts, (workers - prefill_workers) / self._outputs)
        else:
            served = workers / (self._prompts + self._outputs)
        return dataclasses.replace(NOTHING, slo_attainment=min(1.0, served))


def workers_of(sized: Sized | None) -> int | None:
    return sized and sized.workers


@given(
    prompts=st.floats(0.1, 20.0),
    outputs=st.floats(0.1, 20.0),
    most=st.integers(1, 40),
    share=st.floats(0.05, 1.0),
    guess=st.floats(0.0, 1.0),
)
def test_no_smaller_fleet_suffices(prompts: float, outputs: float, most: int, share: float, guess: float):
    fleets = Fleets(prompts, outputs)
    sizes = range(1, most + 1)
    enough = [n for n in sizes if fleets(n, 0).slo_attainment >= share]
    assert workers_of(one_phase(fleets, most, share)) == min(enough, default=None)
    split = [n for n in sizes for p in range(1, n) if fleets(n, p).slo_attainment >= share]
    found = two_phases(fleets, most, share, guess)
    assert workers_of(found) == min(split, default=None)
    assert found is None or fleets(found.workers, found.prefill_workers) == found.result


def test_few_fleets_are_tried():
    fleets = Fleets(100.0, 60.0)
    assert workers_of(one_phase(fleets, 1000, 1.0)) == 160 and len(fleets.tried) < 18
    fleets.tried.clear()
    found = two_phases(fleets, 1000, 1.0, 0.6)
    assert found is not None and (found.workers, found.prefill_workers) == (160, 100) and len(fleets.tried) < 80


def test_the_command_names_the_smallest_fleets(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    json_file = tmp_path / "out.json"
    load = ["--load", "60", "--pages-per-worker", "100", "--slo-ttft", "300"]
    assert (
        main(["simulate", "generated:200", "--workers", "16", *load, "--find", "0.95", "--json", str(json_file)]) == 0
    )
    found = json.loads(json_file.read_text())
    lines = capsys.readouterr().out.splitlines()
    one, two = found["one phase"], found["two phases"]
    assert lines[-2:] == [
        f"one phase: {one['workers']} workers",
        f"two phases: {two['prefill_workers']} prefill + {two['workers'] - two['prefill_workers']} decode workers",
    ]
    assert one["workers"] > 1 and one["prefill_workers"] == 0 and one["slo_attainment"] >= 0.95
    smaller = ["--workers", str(one["workers"] - 1), "--policy", "cost", "--json", str(json_file)]
    assert main(["simulate", "generated:200", *load, *smaller]) == 0
    assert json.loads(json_file.read_text())["cost"]["slo_attainment"] < 0.95


def test_no_fleet_suffices(capsys: pytest.CaptureFixture[str]):
    options = ["--workers", "2", "--pages-per-worker", "50", "--slo-ttft", "1", "--find", "0.9"]
    assert main(["simulate", "generated:20", *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"{phases}: none of up to 2 workers" for phases in ("one phase", "two phases")]
