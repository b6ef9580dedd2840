"""Breakers and health, rule by rule, and under random events."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.router.breaker import BACK_OFF_FIRST_S, BACK_OFF_MOST_S, Breaker, Circuit
from penstock.router.cost import CostPolicy
from penstock.router.health import FAILURES, KEPT_S, PAIR_FAILURES, Health
from penstock.router.policy import RequestFacts
from penstock.router.simple_policies import LeastLoadPolicy
from tests.router.test_fleet import ONE
from tests.router.test_policy import candidate, names


def worker(name: str, role: str = "decode") -> WorkerInfo:
    return msgspec.structs.replace(ONE, worker_id=name, incarnation=f"{name}-1", role=role)


def health(*names: str, slow_start_s: float = 0.0) -> Health:
    found = Health(slow_start_s, stall_timeout_s=10.0)
    for name in names:
        found.joined(worker(name, "prefill" if name.startswith("p") else "decode"), 0.0)
    return found


def test_a_breaker_opens_probes_and_closes():
    one = Breaker(2)
    assert not one.failed("a", 0.0) and one.allows(0.0)
    assert one.failed("b", 0.0) and one.state(1.0) is Circuit.OPEN and one.retry_in_s(1.0) == BACK_OFF_FIRST_S - 1
    assert one.allows(2.0) and one.state(2.0) is Circuit.HALF_OPEN
    one.began(2.0)
    assert not one.allows(3.0), "one probe at a time"
    assert one.allows(4.0), "it was never heard of again"
    one.began(4.0)
    assert not one.failed("c", 4.5) and one.retry_in_s(4.5) == 2 * BACK_OFF_FIRST_S and one.reason == "c"
    one.succeeded()
    assert one.state(4.6) is Circuit.CLOSED and not one.failed("d", 5.0)


@given(st.lists(st.tuples(st.sampled_from(["failed", "succeeded", "began"]), st.integers(0, 800)), max_size=50))
def test_a_breaker_never_shuts_anybody_out_for_ever(events):
    one, now, in_a_row = Breaker(3), 0.0, 0
    for what, eighths in events:
        now += eighths / 8  # seconds that add up without rounding
        if what == "failed":
            one.failed("", now)
            in_a_row += 1
        elif what == "succeeded":
            one.succeeded()
            in_a_row = 0
        else:
            one.began(now)
        assert (one.state(now) is Circuit.CLOSED) == (in_a_row < 3)
        assert 0 <= one.retry_in_s(now) <= BACK_OFF_MOST_S and one.allows(now + one.retry_in_s(now))


def test_without_a_step_a_worker_that_runs_something_is_stalled():
    one = health("d1")
    one.reported("d1-1", WorkerLoad(running=1, steps=5), 1.0)
    one.reported("d1-1", WorkerLoad(running=1, steps=5), 10.0)
    assert one.tick(11.0) == [] and one.usable("d1-1", 11.0)
    [(stalled, reason)] = one.tick(11.1)
    assert stalled.worker_id == "d1" and reason == "no step for 10 s" and not one.usable("d1-1", 11.1)
    assert one.tick(11.2) == [] and one.state("d1-1", 11.2).state == "stalled"
    one.reported("d1-1", WorkerLoad(running=1, steps=6), 12.0)
    assert one.tick(12.0) == [] and one.usable("d1-1", 12.0) and one.counters["workers_stalled"] == 1


def test_prompts_that_nobody_begins_are_a_stall_and_those_that_wait_for_pages_are_none():
    one = health("d1", "p1")
    for second in (1.0, 5.0, 10.0):
        one.reported("d1-1", WorkerLoad(waiting=2, deferred=1, queued_tokens=50), second)
        one.reported("p1-1", WorkerLoad(waiting=2, queued_tokens=50), second)
    assert [worker.worker_id for worker, _ in one.tick(11.5)] == ["p1"]
    one.reported("p1-1", WorkerLoad(), 12.0)
    assert one.tick(12.0) == [] and one.usable("p1-1", 12.0)


def test_an_idle_worker_is_not_stalled_but_a_silent_one_is():
    one = health("d1")
    for second in range(100):
        one.reported("d1-1", WorkerLoad(steps=5), float(second))
        assert one.tick(float(second)) == []
    one.reported("d1-1", WorkerLoad(running=1, steps=5), 100.0)
    assert one.tick(109.0) == [], "what it runs may just have come"
    assert one.tick(111.0)[0][1] == "no answer for 10 s"
    assert one.tick(121.0, lambda incarnation: 20.0) == [] and one.usable("d1-1", 121.0), "its steps take so long"


def test_a_lost_worker_counts_as_failed_one_that_has_left_does_not():
    one = health()
    for incarnation in range(FAILURES):
        info = msgspec.structs.replace(worker("d1"), incarnation=str(incarnation))
        one.joined(info, 0.0)
        assert one.usable(str(incarnation), 0.0)
        one.lost(str(incarnation), 0.0)
    one.joined(worker("d1"), 0.0)
    assert one.state("d1-1", 0.0).state == "broken" and not one.usable("d1-1", 0.0)
    assert one.state("d1-1", 3.0).state == "probing" and one.usable("d1-1", 3.0)
    one.served("d1-1", None, None, 3.0)
    assert one.state("d1-1", 3.0).state == "up"
    for _ in range(2 * FAILURES):
        one.left("d1-1")
        one.joined(worker("d1"), 4.0)
    assert one.usable("d1-1", 4.0)


def test_the_breaker_of_a_worker_that_is_gone_is_kept_for_a_while_only():
    one = health("d1", "d2")
    for name in ("d1", "d2"):
        one.failed(f"{name}-1", "it fails", 0.0)
    one.lost("d1-1", 1.0)
    one.tick(1.0 + KEPT_S)
    assert sorted(one._breakers) == ["d1", "d2"]
    one.tick(1.1 + KEPT_S)
    assert sorted(one._breakers) == ["d2"], "a worker that is there keeps it until it serves"


def test_a_pair_fails_as_a_pair():
    one = health("p1", "p2", "d1", "d2")
    for _ in range(PAIR_FAILURES):
        assert one.bad_pairs(0.0) == frozenset()
        one.served("d1-1", "p1-1", False, 0.0)
    assert one.bad_pairs(0.0) == {("p1-1", "d1-1")} and one.counters["pairs_broken"] == 1
    assert all(one.usable(f"{name}-1", 0.0) for name in ("p1", "p2", "d1", "d2"))
    [(prefill, decode, retry_in_s)] = one.broken_pairs(0.0)
    assert (prefill.worker_id, decode.worker_id, retry_in_s) == ("p1", "d1", BACK_OFF_FIRST_S)
    assert one.bad_pairs(2.0) == frozenset()
    one.began("d1-1", "p1-1", 2.0)
    assert one.bad_pairs(2.1) == {("p1-1", "d1-1")}, "the probe is under way"
    one.served("d1-1", "p1-1", True, 2.2)
    assert one.bad_pairs(2.2) == frozenset() and one.broken_pairs(2.2) == []
    one.served("d1-1", "p1-1", False, 3.0)
    one.left("p1-1")
    one.served("d1-1", "p1-1", False, 3.0)
    assert one.bad_pairs(3.0) == frozenset(), "with its workers the pair is gone"


@pytest.mark.parametrize("policy", [CostPolicy(), LeastLoadPolicy()])
def test_policies_avoid_bad_pairs(policy):
    fleet = [candidate("d1"), candidate("d2", queued_tokens=5000), candidate("p1", "prefill")]
    fleet.append(candidate("p2", "prefill", queued_tokens=100))
    assert names(policy.choose(RequestFacts(1000), fleet)) == ("d1", "p1")
    avoid = frozenset({("p1-1", "d1-1")})
    assert names(policy.choose(RequestFacts(1000, avoid_pairs=avoid), fleet)) == ("d1", "p2")
    avoid |= {("p2-1", "d1-1")}
    assert names(policy.choose(RequestFacts(1000, avoid_pairs=avoid), fleet)) == ("d1", None)


def test_a_worker_that_joins_others_starts_slowly():
    one = health("d1", slow_start_s=10.0)
    one.joined(worker("d2"), 100.0)
    both = ["d1-1", "d2-1"]
    for begin, least, most in ((100.0, 8, 14), (105.0, 50, 60), (110.0, 100, 100)):
        times = sum("d2-1" in one.choosable(both, begin) for _ in range(100))
        assert least <= times <= most
        assert all("d1-1" in one.choosable(both, begin) for _ in range(10))
    assert one.state("d2-1", 105.0).state == "starting" and one.state("d2-1", 110.0).state == "up"
    assert one.choosable(["d2-1"], 100.0) == ["d2-1"], "alone it does what there is to do"


def test_a_fleet_that_starts_starts_at_once():
    one = health("d1", "d2", slow_start_s=10.0)
    assert all(one.choosable(["d1-1", "d2-1"], 0.5) == ["d1-1", "d2-1"] for _ in range(50))


class Fleet(RuleBasedStateMachine):
    """Whatever happens, in time every worker that is there may be used, and what is told of it is one of the words."""

    def __init__(self) -> None:
        super().__init__()
        self.health = Health(5.0, 10.0)
        self.now = 0.0
        self.there: set[str] = set()

    @rule(name=st.sampled_from(["d1", "d2", "p1", "p2"]))
    def join_or_leave(self, name: str) -> None:
        if name in self.there:
            self.there.remove(name)
            self.health.lost(f"{name}-1", self.now)
        else:
            self.there.add(name)
            self.health.joined(worker(name), self.now)

    @rule(name=st.sampled_from(["d1", "d2", "p1"]))
    def fail(self, name: str) -> None:
        self.health.failed(f"{name}-1", "it failed", self.now)

    @rule(
        decode=st.sampled_from(["d1", "d2"]),
        prefill=st.sampled_from(["p1", "p2", None]),
        how=st.sampled_from([True, False, None]),
    )
    def serve(self, decode: str, prefill: str | None, how: bool | None) -> None:
        lender = f"{prefill}-1" if prefill else None
        self.health.began(f"{decode}-1", lender, self.now)
        self.health.served(f"{decode}-1", lender, how, self.now)

    @precondition(lambda self: self.there)
    @rule(data=st.data(), steps=st.integers(0, 3), running=st.integers(0, 1))
    def report(self, data: st.DataObject, steps: int, running: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.there)))
        self.health.reported(f"{name}-1", WorkerLoad(running=running, steps=steps), self.now)

    @rule(seconds=st.sampled_from([0.1, 2.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.health.tick(self.now)

    @invariant()
    def consistent(self) -> None:
        here = [f"{name}-1" for name in self.there]
        for incarnation in here:
            state = self.health.state(incarnation, self.now)
            assert state.state in ("starting", "up", "stalled", "broken", "probing")
            assert self.health.usable(incarnation, self.now) == (state.state not in ("stalled", "broken"))
            assert bool(state.reason) == (state.state in ("stalled", "broken", "probing"))
        assert {one for pair in self.health.bad_pairs(self.now) for one in pair} <= set(here)
        usable = [one for one in here if self.health.usable(one, self.now)]
        chosen = self.health.choosable(usable, self.now)
        assert set(chosen) <= set(usable) and bool(chosen) == bool(usable), "somebody is always left to choose"

    def teardown(self) -> None:
        self.now += BACK_OFF_MOST_S + 1
        for name in self.there:
            self.health.reported(f"{name}-1", WorkerLoad(), self.now)
        self.health.tick(self.now)
        assert all(self.health.usable(f"{name}-1", self.now) for name in self.there)
        assert self.health.bad_pairs(self.now) == frozenset()


TestFleetHealth = Fleet.TestCase
TestFleetHealth.settings = settings(max_examples=60, deadline=None)
