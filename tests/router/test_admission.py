"""Admission: who goes, who waits, who is refused; and when to try again."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.config import RouterConfig
from penstock.common.errors import Overloaded, QueueFull, SloUnattainable
from penstock.router.admission import (
    HOLD_MS,
    RETRY_AT_MOST_S,
    Admission,
    DrainRate,
    Limits,
    is_full,
    refusal,
    retry_after_s,
)
from penstock.router.cost import CostPolicy
from penstock.router.expected import Expected, expected, of_placement, quickest
from penstock.router.policy import RequestFacts
from penstock.router.rates import WorkerRates
from penstock.router.turns import new_admission
from tests.router.test_policy import but, candidate

MS = st.floats(0.0, 1e6)
EXPECTED = st.builds(Expected, wait_ms=MS, room_ms=MS, prefill_ms=MS, tpot_ms=MS)
LIMITS = st.builds(Limits, slo_ttft_ms=MS, slo_tpot_ms=MS)
IDLE = Expected(0.0, 0.0, 10.0, 5.0)


@given(LIMITS, EXPECTED, MS, st.floats(0.0, 1e9))
def test_what_is_let_in_keeps_the_objectives_and_what_is_refused_does_not(limits, found, waited_ms, ahead_ms):
    error = refusal(limits, found, waited_ms, ahead_ms)
    late = 0 < limits.slo_ttft_ms < waited_ms + ahead_ms + found.ttft_ms
    slow = 0 < limits.slo_tpot_ms < found.tpot_ms
    long = ahead_ms > 0 and ahead_ms + found.wait_ms > limits.queue_timeout_s * 1e3
    assert (error is not None) == (late or slow or long)
    if error is not None:
        assert isinstance(error, Overloaded) and error.status == 429 and 1 <= error.retry_after_s <= 60
        assert isinstance(error, SloUnattainable) == (late or slow)


@given(EXPECTED, st.floats(1.0, 1e6))
def test_after_the_wait_that_is_told_an_otherwise_idle_fleet_is_in_time(found, slo_ms):
    error = refusal(Limits(slo_ttft_ms=slo_ms), found, 0.0)
    if error is None:
        return
    assert isinstance(error, Overloaded)
    assert error.hopeless == (found.prefill_ms > slo_ms)
    if not error.hopeless and error.retry_after_s < 60:
        later = dataclasses.replace(found, wait_ms=max(0.0, found.wait_ms - error.retry_after_s * 1e3))
        assert refusal(Limits(slo_ttft_ms=slo_ms), later, 0.0) is None


@given(MS, MS)
def test_retry_after_grows_with_what_is_too_much(one_ms, other_ms):
    low, high = sorted((one_ms, other_ms))
    assert 1 <= retry_after_s(low) <= retry_after_s(high) <= 60 and retry_after_s(low) == int(retry_after_s(low))


def test_without_objectives_nothing_is_refused_that_need_not_wait():
    assert refusal(Limits(), Expected(1e9, 1e9, 1e9, 1e9), 1e9) is None


def test_the_first_token_is_expected_after_queue_and_prompt():
    rates = WorkerRates(prefill_tokens_per_s=1000.0, prefill_step_ms=2.0, decode_step_ms=10.0, decode_sequence_ms=1.0)
    worker = but(candidate("d", held=400), prompt_tokens=500, rates=rates, placed=3)
    found = expected(RequestFacts(1000), worker, worker)
    assert (found.wait_ms, found.room_ms, found.prefill_ms) == (502.0, 0.0, 602.0)
    assert found.tpot_ms == pytest.approx(10.0 + 4.0 + 1000 * rates.decode_context_ms)
    full = but(worker, load=dataclasses_load(num_pages=100, free_pages=100), placed=8)
    assert expected(RequestFacts(100), full, full).room_ms > 0 and is_full(expected(RequestFacts(100), full, full))
    assert not is_full(found) and is_full(dataclasses.replace(found, wait_ms=HOLD_MS + 1))


def dataclasses_load(**load: int):
    return candidate("x", **load).load


WORKERS = st.lists(
    st.tuples(st.sampled_from(["decode", "prefill"]), st.integers(0, 1000), st.integers(0, 5000)), max_size=8
)


@given(WORKERS, st.integers(1, 1000), st.integers(0, 500))
def test_the_quickest_is_as_quick_as_any(workers, tokens, minimum):
    facts = RequestFacts(tokens)
    fleet = [
        but(candidate(f"w{i}", role, held=held), prompt_tokens=queued, reserved_tokens=queued)
        for i, (role, held, queued) in enumerate(workers)
    ]
    best, routed = quickest(facts, fleet, minimum), CostPolicy().choose(facts, fleet, minimum)
    assert (best is None) == (routed is None)
    if best is not None and routed is not None:
        assert of_placement(facts, best, fleet).ttft_ms <= of_placement(facts, routed, fleet).ttft_ms + 1e-9


def enqueue(admission: Admission[str], key: str, tenant: str = "", cost: float = 100.0, now: float = 0.0, **more):
    found, priority = more.get("found", IDLE), more.get("priority", 0)
    return admission.enqueue(key, tenant, priority, cost, key, found, more.get("capacity", 1000.0), now)


def test_a_queue_that_is_full_refuses_whoever_wants_most():
    admission: Admission[str] = Admission(Limits(max_queued=3))
    for number in range(3):
        assert enqueue(admission, f"greedy-{number}", "greedy") == []
    [(place, error)] = enqueue(admission, "modest", "modest")
    assert place.key == "greedy-2" and isinstance(error, QueueFull) and len(admission) == 3
    [(place, error)] = enqueue(admission, "greedy-3", "greedy")
    assert place.key == "greedy-3" and admission.refused["queue_full"] == 2
    assert [admission.next().key for _ in range(3)] == ["greedy-0", "modest", "greedy-1"]


def test_who_would_wait_too_long_is_refused_at_once_and_told_when_to_come():
    admission: Admission[str] = Admission(Limits(queue_timeout_s=2.0))
    assert enqueue(admission, "a", cost=2500.0) == []
    [(place, error)] = enqueue(admission, "b", cost=1.0)
    assert place.key == "b" and type(error) is Overloaded and error.retry_after_s == 1
    assert enqueue(admission, "urgent", cost=1.0, priority=-1) == [], "higher priorities pass"
    assert admission.refused["wait"] == 1 and len(admission) == 2


def test_how_fast_a_queue_gets_on_is_learnt_as_long_as_somebody_waits():
    """Who is told how long it will wait is told what was seen, not again and again what was expected."""
    admission: Admission[str] = Admission(Limits(queue_timeout_s=2.0))
    assert enqueue(admission, "a", cost=1000.0, capacity=1000.0) == []
    first = admission.next()
    assert first is not None
    admission.back(first)  # no room yet
    assert enqueue(admission, "b", cost=4000.0, capacity=1000.0) == []
    first = admission.next()
    assert first is not None and first.key == "a"
    admission.went(first, now=0.0)
    [(place, _)] = enqueue(admission, "c", capacity=1e6)
    assert place.key == "c", "four thousand at eleven hundred a second, whatever was thought of the fleet meanwhile"
    admission.forget("b")
    assert len(admission) == 0
    assert enqueue(admission, "d", cost=1000.0, capacity=1000.0) == []
    assert enqueue(admission, "e", capacity=1000.0) == [], "nobody waited: it begins with what is expected"


def test_an_objective_counts_the_queue_too():
    admission: Admission[str] = Admission(Limits(slo_ttft_ms=500.0))
    assert enqueue(admission, "a", cost=495.0) == []
    assert isinstance(enqueue(admission, "b")[0][1], SloUnattainable)
    assert admission.judge(IDLE, waited_ms=0.0) is True
    error = admission.judge(IDLE, waited_ms=3495.0)
    assert isinstance(error, SloUnattainable) and error.retry_after_s == 4, "so much later than allowed"
    assert admission.refused == {"slo": 2, "wait": 0, "queue_full": 0, "in_flight": 0}
    assert admission.judge(Expected(HOLD_MS + 1, 0, 0, 0), 0.0) is not True


@given(st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(1.0, 1000.0)), min_size=1, max_size=50))
def test_a_drain_rate_stays_between_what_was_expected_and_what_left(steps):
    rate, now = DrainRate(), 0.0
    rate.begin(100.0, now)
    for seconds, cost in steps:
        now += seconds
        rate.left(cost, now)
        assert 0 < rate.needs_ms(1000.0, now) < math.inf


def test_one_long_prompt_does_not_make_the_queue_seem_hopeless():
    rate = DrainRate()
    rate.begin(100.0, 0.0)
    assert rate.needs_ms(100.0, 30.0) == pytest.approx(4000.0), "a second's work, and nothing has left for 30 s"


def test_a_steady_drain_is_measured():
    rate = DrainRate()
    rate.begin(1e4, 0.0)
    for tick in range(1, 1000):
        rate.left(50.0, tick * 0.1)  # 500 a second
    assert rate.needs_ms(1000.0, 99.9) == pytest.approx(2000.0, rel=0.02)


def test_processes_that_share_a_port_share_its_limits():
    alone = RouterConfig(max_queued=8, max_inflight=100)
    assert (new_admission(alone).limits.max_queued, alone.own_max_inflight) == (8, 100)
    third = dataclasses.replace(alone, group_ports=("1", "2", "3"))
    assert (new_admission(third).limits.max_queued, third.own_max_inflight) == (3, 34)
    crowd = dataclasses.replace(alone, group_ports=tuple(map(str, range(20))))
    assert new_admission(crowd).limits.max_queued == 1, "nobody is left without"


def test_what_nobody_knows_is_told_to_be_tried_again_in_a_while():
    assert (retry_after_s(math.inf), retry_after_s(1.0), retry_after_s(1500.0)) == (RETRY_AT_MOST_S, 1.0, 2.0)
    admission: Admission[str] = Admission(Limits(queue_timeout_s=30.0))
    full = Expected(wait_ms=1000.0, room_ms=0.0, prefill_ms=0.0, tpot_ms=0.0)
    assert admission.enqueue("a", "", 0, 100.0, "a", full, 0.0, 1.0) == []
    ((_, error),) = admission.enqueue("b", "", 0, 100.0, "b", full, 0.0, 1.0)
    assert isinstance(error, Overloaded) and "for nobody knows how long" in error.message
    assert error.retry_after_s == RETRY_AT_MOST_S
