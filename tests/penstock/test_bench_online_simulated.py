"""benchmarks/online_simulated.py: its rates are what was recorded, and with the defaults every mark is in reach."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import online_simulated
from benchmarks.online_figures import PEERS, read_loads


def test_chunks_and_prompts_take_what_was_recorded() -> None:
    recorded = {"ttft_128_ms": 6.0, "ttft_512_ms": 12.0, "ttft_2048_ms": 48.0}
    rates = online_simulated.rates(recorded, 2048, 160)
    assert rates.prefill_ms(160) == pytest.approx(6.5) and rates.prefill_ms(2048) == pytest.approx(48.0)


def test_loads_are_drawn_anew_at_the_rate_of_the_recorded_one() -> None:
    load = read_loads()["W1@24"]
    assert online_simulated.draws(load, 0) == [load]
    drawn = online_simulated.draws(load, 20)
    assert len({one.arrivals_s for one in drawn}) == 20 and drawn == online_simulated.draws(load, 20)
    assert {len(one.arrivals_s) for one in drawn} == {len(load.arrivals_s)}
    ends = [one.arrivals_s[-1] for one in drawn]
    assert statistics.mean(ends) == pytest.approx(load.arrivals_s[-1], rel=0.03)
    gaps = [b - a for a, b in pairwise(drawn[0].arrivals_s)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.15), "exponential ones"


def test_means_are_of_each_figure() -> None:
    assert online_simulated.means([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}]) == {"a": 2.0, "b": 2.0}


def test_the_decode_worker_takes_what_the_prefill_worker_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The load of the third row is more than one prefill worker can compute."""
    out = tmp_path / "record.json"
    online_simulated.main(["--out", str(out)])
    record = json.loads(out.read_text())
    marks = json.loads((PEERS / "marks-2xh200-online.json").read_text())
    for name, found in record["balanced"].items():
        for key, mark in marks[name]["first mark"].items():
            better = found[key] >= mark if key in ("goodput", "out_tok_s") else found[key] <= mark
            assert better, (name, key, found[key], mark)
    assert record["handed_off"]["W1@24"]["goodput"] < 0.5
    assert all(found["handed_off"] == 1.0 for found in record["handed_off"].values())
    shares = [record["balanced"][name]["handed_off"] for name in ("W1@8", "W1@16", "W1@24")]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.9
    assert "W2@6" in capsys.readouterr().out
