"""An engine that is asked not to wait for the device."""

from __future__ import annotations

import pytest

from tests.engine.test_run_ahead import expected_tokens, make_engine, source


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_a_step_that_is_not_done_is_not_waited_for(run_ahead: int) -> None:
    engine, executor = make_engine(run_ahead)
    engine.add(source("a", [1, 2], max_tokens=5))
    executor.ended.clear()
    submitted = [engine.step_if_done() for _ in range(run_ahead)]
    assert all(output is not None and output.outputs == () for output in submitted)
    assert engine.step_if_done() is None
    assert (engine.steps, len(executor.in_flight)) == (run_ahead + 1, run_ahead + 1)
    assert engine.awaited is executor.in_flight[0]
    assert engine.step_if_done() is None  # and nothing more is submitted
    assert (engine.steps, engine.stalled) == (run_ahead + 1, False)
    executor.ended.set()
    tokens: list[int] = []
    while engine.has_work():
        output = engine.step_if_done()
        assert output is not None
        tokens += [token for item in output.outputs for token in item.token_ids]
    assert tokens == expected_tokens(source("a", [1, 2], max_tokens=5), 64)


def test_who_comes_while_a_step_is_under_way_is_in_the_next_one() -> None:
    engine, executor = make_engine(1)
    engine.add(source("a", [1] * 4, max_tokens=1))  # nothing to submit behind its only step
    executor.ended.clear()
    assert engine.step_if_done() is not None
    assert engine.step_if_done() is None
    engine.add(source("b", [2] * 4, max_tokens=1))
    assert engine.step_if_done() is None
    assert [[work.key for work in plan.work] for plan, _ in engine.scheduler._in_flight] == [["a:0:0"], ["b:0:0"]]
    executor.ended.set()
    assert [engine.step().outputs[0].request.request_id for _ in range(2)] == ["a", "b"]
