"""benchmarks/online_paced.py: a step ends when it should, times are a fast fleet's again, and the whole of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import online_paced
from benchmarks.paced_worker import Pace, Paced
from penstock.bench.serving_metrics import RequestRecord
from penstock.engine.plan import SequenceWork, StepPlan, StepResult


def test_a_step_is_done_when_its_time_is_over() -> None:
    result = StepResult(1, ())
    handle = SimpleNamespace(done=lambda: True, wait=lambda: None, result=lambda: result)
    paced = Paced(cast(Any, SimpleNamespace(submit=lambda plan: handle)), Pace(40.0, 1.0, 5.0, 0.0))
    begins = time.monotonic()
    step = paced.submit(StepPlan(1, (), (), (SequenceWork("a", 0, 11, (), True),)))
    assert not step.done() or time.monotonic() - begins >= 0.055, "40 ms, ten tokens more than one, and a sequence"
    assert step.result() is result
    assert time.monotonic() - begins >= 0.055 and step.done()


def test_a_prompt_s_tokens_take_longer_behind_others() -> None:
    pace = Pace(0.0, 0.0, 0.0, 0.0, attended_ms=2.0)
    chunk, decode = SequenceWork("a", 100, 10, (), False), SequenceWork("b", 100, 1, (), True)
    assert pace.seconds(StepPlan(1, (), (), (decode, chunk))) == pytest.approx(2e-3 * 10 * 105)
    assert pace.slower(3.0).attended_ms == 6.0


def test_times_are_those_of_a_fleet_that_is_not_slowed_down() -> None:
    span: dict[str, Any] = {"name": "transfer", "ms": 10.0, "exposed_ms": 5.0, "bytes": 7}
    record = RequestRecord(3, 8.0, 2.0, 4.0, [1.0, 1.0], 3, timeline=[span])
    found = online_paced.at_full_speed(record, 4.0)
    assert (found.start, found.ttft, found.latency, found.itl) == (2.0, 0.5, 1.0, [0.25, 0.25])
    assert found.timeline == [{"name": "transfer", "ms": 2.5, "exposed_ms": 1.25, "bytes": 7}]
    assert found.tpot == record.tpot / 4


@pytest.mark.system
def test_a_paced_fleet_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    assert online_paced.main(["--loads", "W1@8", "--most", "2", "--slower", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["loads"]["W1@8"]["ok"] == 2 and record["loads"]["W1@8"]["handed_off"] >= 0.5
    assert record["rates"]["W1@8"].keys() == {"prefill-0", "decode-0"}
    assert "1 + 1, paced" in capsys.readouterr().out
