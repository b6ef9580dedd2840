"""`penstock simulate`: what it prints and writes, and that mistakes are one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import routing
from penstock.cli import main
from penstock.common.config import ROUTING_POLICIES, RouterConfig
from penstock.simulate.result import PolicyResult
from penstock.simulate.runs import compare
from penstock.simulate.simulator import FleetShape
from penstock.simulate.trace import read_trace

FLEET = ["--workers", "4", "--pages-per-worker", "50"]
PROMISED = {
    "hit_ratio",
    "oracle_hit_ratio",
    "max_over_mean_load",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "itl_p99_ms",
    "goodput",
}


def test_all_policies_in_one_table_one_file_and_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    json_file, plot = tmp_path / "out.json", tmp_path / "out.png"
    options = [*FLEET, "--utilisation", "0.7", "--json", str(json_file), "--plot", str(plot)]
    assert main(["simulate", "generated:300", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["policy", *ROUTING_POLICIES]
    found = json.loads(json_file.read_text())
    assert tuple(found) == ROUTING_POLICIES and all(set(result) >= PROMISED for result in found.values())
    assert found["cost"]["hit_ratio"] > 1.1 * found["random"]["hit_ratio"] and found["cost"]["requests"] == 300
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")


def test_prefixes_are_read_from_others_as_in_a_real_fleet_unless_they_must_not_be(tmp_path: Path):
    fetched = []
    for options in ([], ["--no-fetch-prefixes"]):
        json_file = tmp_path / "out.json"
        load = ["--utilisation", "0.8", "--policy", "cost", "--json", str(json_file), *options]
        assert main(["simulate", "generated:300", *FLEET, *load]) == 0
        fetched.append(json.loads(json_file.read_text())["cost"]["fetched_ratio"])
    assert RouterConfig().fetch_prefixes and fetched[0] > 0.0 == fetched[1]


def test_two_phases_and_a_repeated_trace(tmp_path: Path):
    json_file = tmp_path / "out.json"
    options = [*FLEET, "--prefill-workers", "2", "--policy", "cost", "--repeat", "3", "--json", str(json_file)]
    assert main(["simulate", "generated:50", *options]) == 0
    assert json.loads(json_file.read_text())["cost"]["requests"] == 150


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["nowhere.csv", *FLEET], "cannot read the trace nowhere.csv"),
        (["generated:9"], "required: --workers, --pages-per-worker"),
        (["generated:9", *FLEET, "--policy", "best"], "invalid choice: 'best'"),
        (["generated:9", *FLEET, "--repeat", "0"], "--repeat: must be at least 1"),
        (["generated:9", *FLEET, "--prefill-workers", "4"], "every request ends on a decode worker"),
        (["generated:9", "--workers", str(10**20), "--pages-per-worker", "1"], "--workers: must be from 1 to 10000"),
        (["generated:9", *FLEET, "--prefill-tokens-per-s", "0"], "--prefill-tokens-per-s: must be at least 1, got 0"),
        (["generated:9", *FLEET, "--link-bytes-per-s", "1e300"], "--link-bytes-per-s: must be from 1000 to 1e+15"),
        (["generated:9", *FLEET, "--decode-step-ms", "0"], "--decode-step-ms: must be at least 0.001, got 0"),
        (["generated:9", *FLEET, "--link-setup-ms", "1e300"], "--link-setup-ms: must be from 0 to 1e+06, got 1e+300"),
        (["generated:9", *FLEET, "--utilisation", "0"], "--utilisation: must be at least 1e-06, got 0"),
        (["generated:9", *FLEET, "--utilisation", "nan"], "--utilisation: must be from 1e-06 to 1e+06, got nan"),
        (["generated:9", *FLEET, "--load", "1e-320"], "--load: must be at least 1e-06, got 1e-320"),
        (["generated:9", *FLEET, "--slo-ttft", "nan"], "--slo-ttft: must be at least 0, got nan"),
        (["generated:9", *FLEET, "--slo-tpot", "-1"], "--slo-tpot: must be at least 0, got -1"),
        (["generated:9", *FLEET, "--find", "1.5"], "--find: must be from 1e-06 to 1, got 1.5"),
        (["generated:9", *FLEET, "--find", "0.9", "--utilisation", "0.7"], "--utilisation is of a given fleet"),
        (["generated:9", *FLEET, "--find", "0.9", "--prefill-workers", "1"], "looks for the number of prefill workers"),
        (["generated:9", "--workers", "1", "--pages-per-worker", "1"], "a worker has 1"),
        (["generated:9", *FLEET, "--json", "/nowhere/out.json"], "cannot write /nowhere/out.json"),
    ],
)
def test_mistakes(options: list[str], error: str, capsys: pytest.CaptureFixture[str]):
    assert main(["simulate", *options]) == 2
    err = capsys.readouterr().err
    assert error in err and err.count("\n") == 1


def test_a_trace_that_is_too_long_for_the_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"timestamp": at, "input_length": 512, "output_length": 5, "hash_ids": [1]} for at in (0, -1e300)]
    (tmp_path / "trace").write_text("\n".join(map(json.dumps, rows)))
    assert main(["simulate", str(tmp_path / "trace"), *FLEET]) == 2
    assert "the requests come over more than 116 days: too long to simulate" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", "generated:9", *FLEET, "--plot", "out.png"]) == 2
    captured = capsys.readouterr()
    assert "pip install 'penstock[plot]'" in captured.err and captured.out == ""


def test_the_marks_of_the_benchmark():
    """The hits are a share of the oracle's, the p99 is beside that of the best other policy, what misses is bold."""
    fleet = FleetShape(4, 50)
    requests = read_trace("generated:100", 512)
    (fetching,) = compare(requests, fleet, ["cost"], routing.Slo(), fetch=True)
    (other,) = compare(requests, fleet, ["random"], routing.Slo())
    mine = PolicyResult(**vars(fetching) | {"policy": routing.FETCH, "hit_ratio": 0.3, "oracle_hit_ratio": 0.4})
    mine = PolicyResult(**vars(mine) | {"max_over_mean_load": 1.2, "ttft_p99_ms": 50.0})
    others = PolicyResult(**vars(other) | {"ttft_p99_ms": 100.0})
    found = {"balance": {"known": 1.1}, "random": vars(others), routing.FETCH: vars(mine)}
    assert routing.marks(found) == pytest.approx((0.75, 1.2, 0.5))
    assert list(routing.marks_table({"here": found}))[-1] == "| here | **0.750** | **1.200** | 1.100 | 0.500 |"
    assert len(list(routing.policies_table({"here": found}))) == 2 + 2


def test_the_documents_are_what_the_benchmark_makes_of_its_record():
    tables = routing.TABLES.read_text()
    (source,) = set(re.findall(r"routing-[0-9a-f]+\.json", tables))
    record = json.loads((routing.RESULTS / source).read_text())
    assert tables == routing.all_tables(record, source)
    document = routing.DOCUMENT.read_text()
    assert document == routing.with_tables(document, record)
    assert document.count("<!-- end of ") == 3 and document.count("\n| ") > 30
