"""The supervisor's decisions, with plain lists and a hypothesis state machine; no process, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.supervisor import (
    FIRST_BACKOFF_S,
    LONGEST_BACKOFF_S,
    STEADY_S,
    Failure,
    Kill,
    Member,
    Start,
    State,
    Supervisor,
    Terminate,
)

REDIS = Member("redis", tier=0, gate=True, drain_s=5)
PREFILL = Member("prefill-0", tier=1, drain_s=30)
DECODE = Member("decode-0", tier=1, drain_s=40)
ROUTER = Member("router", tier=2, drain_s=20)
FLEET = [REDIS, PREFILL, DECODE, ROUTER]


def running_fleet() -> Supervisor:
    supervisor = Supervisor(FLEET)
    supervisor.start(0.0)
    for member in FLEET:
        supervisor.process_ready(member.name, 0.0)
    assert supervisor.ready
    return supervisor


def test_everything_waits_for_the_gate_and_then_starts_together() -> None:
    supervisor = Supervisor(FLEET)
    assert supervisor.start(0.0) == [Start("redis")]
    assert supervisor.tick(100.0) == []
    assert supervisor.process_ready("redis", 100.0) == [Start("prefill-0"), Start("decode-0"), Start("router")]
    assert not supervisor.ready


def test_stops_in_order_of_tiers() -> None:
    supervisor = running_fleet()
    assert supervisor.stop(1.0) == [Terminate("router")]
    assert supervisor.stop(1.5) == []
    assert supervisor.process_exited("router", 0, 2.0) == [Terminate("prefill-0"), Terminate("decode-0")]
    assert supervisor.process_exited("decode-0", 0, 3.0) == []
    assert supervisor.process_exited("prefill-0", 0, 4.0) == [Terminate("redis")]
    assert not supervisor.done
    assert supervisor.process_exited("redis", 0, 5.0) == []
    assert supervisor.done
    assert supervisor.failure is None


def test_a_tier_that_does_not_drain_is_killed() -> None:
    supervisor = running_fleet()
    supervisor.stop(0.0)
    supervisor.process_exited("router", 0, 10.0)
    assert supervisor.next_deadline() == 50.0  # the longest drain of the tier
    assert supervisor.tick(49.9) == []
    assert supervisor.tick(50.0) == [Kill("prefill-0"), Kill("decode-0")]
    assert supervisor.next_deadline() is None
    assert supervisor.process_exited("prefill-0", -9, 50.1) == []
    assert supervisor.process_exited("decode-0", -9, 50.2) == [Terminate("redis")]


def test_kill_ends_all_tiers_at_once() -> None:
    supervisor = running_fleet()
    supervisor.stop(0.0)
    assert supervisor.kill(1.0) == [Kill("redis"), Kill("prefill-0"), Kill("decode-0"), Kill("router")]
    for member in FLEET:
        assert supervisor.process_exited(member.name, -9, 1.1) == []
    assert supervisor.done
    assert supervisor.killed


def test_backoff_doubles_up_to_its_bound_and_begins_anew_after_a_steady_minute() -> None:
    supervisor = running_fleet()
    now, waits = 0.0, []
    for _ in range(9):
        assert supervisor.process_exited("decode-0", 1, now) == []
        due = supervisor.next_deadline()
        assert due is not None
        waits.append(due - now)
        assert supervisor.tick(due - 1e-6) == []
        assert supervisor.tick(due) == [Start("decode-0")]
        now = due
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    supervisor.process_ready("decode-0", now)
    now += STEADY_S
    supervisor.process_exited("decode-0", 1, now)
    assert supervisor.next_deadline() == now + FIRST_BACKOFF_S


def test_a_slow_start_is_not_a_steady_minute() -> None:
    supervisor = running_fleet()
    supervisor.process_exited("decode-0", 1, 0.0)
    supervisor.tick(0.5)
    supervisor.process_exited("decode-0", 1, 300.0)  # loaded for five minutes and failed
    assert supervisor.next_deadline() == 301.0


def test_failure_before_ever_being_ready_ends_the_launch() -> None:
    supervisor = Supervisor(FLEET)
    supervisor.start(0.0)
    supervisor.process_ready("redis", 0.1)
    assert supervisor.process_exited("decode-0", 2, 1.0) == [Terminate("router")]
    assert supervisor.failure == Failure("decode-0", 2)
    assert supervisor.process_exited("prefill-0", 2, 1.1) == []
    assert supervisor.failure == Failure("decode-0", 2)  # the first one is the cause
    assert supervisor.process_exited("router", -15, 1.2) == [Terminate("redis")]
    supervisor.process_exited("redis", 0, 1.3)
    assert supervisor.done


def test_stop_before_everything_has_started() -> None:
    supervisor = Supervisor(FLEET)
    supervisor.start(0.0)
    assert supervisor.stop(0.1) == [Terminate("redis")]
    assert supervisor.process_ready("redis", 0.2) == []
    supervisor.process_exited("redis", 0, 0.3)
    assert supervisor.done


def test_stop_cancels_a_restart() -> None:
    supervisor = Supervisor([ROUTER])
    supervisor.start(0.0)
    supervisor.process_ready("router", 0.0)
    supervisor.process_exited("router", 1, 0.0)
    assert supervisor.stop(0.1) == []
    assert supervisor.done
    assert supervisor.tick(100.0) == []


def test_the_gate_that_died_later_holds_nobody_back() -> None:
    supervisor = running_fleet()
    supervisor.process_exited("redis", -9, 0.0)
    supervisor.process_exited("decode-0", -9, 0.0)
    assert supervisor.tick(0.5) == [Start("redis"), Start("decode-0")]


def test_an_exit_is_reported_once() -> None:
    supervisor = running_fleet()
    supervisor.process_exited("router", 1, 0.0)
    with pytest.raises(RuntimeError, match="router exited while backing_off"):
        supervisor.process_exited("router", 1, 0.0)


@given(st.lists(st.floats(0.0, STEADY_S * 0.99), min_size=1, max_size=20))
def test_backoff_never_shrinks_without_a_steady_minute(lives: list[float]) -> None:
    supervisor = Supervisor([ROUTER])
    supervisor.start(0.0)
    supervisor.process_ready("router", 0.0)
    now, last = 0.0, 0.0
    for life in lives:
        now += life
        supervisor.process_exited("router", 1, now)
        due = supervisor.next_deadline()
        assert due is not None
        assert last <= due - now + 1e-6 <= LONGEST_BACKOFF_S + 1e-3
        last, now = due - now, due
        assert supervisor.tick(due) == [Start("router")]
        supervisor.process_ready("router", due)


class AnyHistory(RuleBasedStateMachine):
    """A shell that does what it is told, with processes that become ready, die and obey whenever they like."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.supervisor = Supervisor(FLEET)
        self.alive: set[str] = set()
        self.told_to_stop: set[str] = set()
        self.stopped = False
        self.obey(self.supervisor.start(self.now))

    def obey(self, commands: list[Start | Terminate | Kill]) -> None:
        for command in commands:
            if isinstance(command, Start):
                assert not self.stopped, "started after the stop"
                assert command.name not in self.alive, "started twice"
                self.alive.add(command.name)
            else:
                assert command.name in self.alive, "a signal to a process that is gone"
                self.told_to_stop.add(command.name)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def becomes_ready(self, data: st.DataObject) -> None:
        self.obey(self.supervisor.process_ready(data.draw(st.sampled_from(sorted(self.alive))), self.now))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), status=st.sampled_from([0, 1, 2, -9]))
    def exits(self, data: st.DataObject, status: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.alive.remove(name)
        commands = self.supervisor.process_exited(name, status, self.now)
        self.stopped = self.stopped or self.supervisor.failure is not None
        self.obey(commands)

    @rule(wait=st.floats(0.01, 100.0))
    def time_passes(self, wait: float) -> None:
        self.now += wait
        self.obey(self.supervisor.tick(self.now))
        deadline = self.supervisor.next_deadline()
        assert deadline is None or deadline > self.now

    @rule()
    def stop(self) -> None:
        self.stopped = True
        self.obey(self.supervisor.stop(self.now))

    @rule()
    def kill(self) -> None:
        self.stopped = True
        self.obey(self.supervisor.kill(self.now))

    @invariant()
    def its_view_is_the_truth(self) -> None:
        assert set(self.supervisor.in_state(State.STARTING, State.READY)) == self.alive
        assert self.supervisor.done == (self.stopped and not self.alive)

    @invariant()
    def a_stopping_fleet_makes_progress(self) -> None:
        if self.stopped and self.alive:
            assert self.told_to_stop & self.alive, "nobody was told to stop"

    @invariant()
    def lower_tiers_outlive_higher_ones(self) -> None:
        if self.stopped and not self.supervisor.killed:
            told = {member.tier for member in FLEET if member.name in self.told_to_stop}
            running = [member.tier for member in FLEET if member.name in self.alive]
            assert all(tier >= max(running, default=0) for tier in told)

    def teardown(self) -> None:
        """Whatever happened, a stop ends with nothing running."""
        self.stop()
        while self.alive:
            due = self.supervisor.next_deadline()
            self.now = self.now + 1 if due is None else due
            self.obey(self.supervisor.tick(self.now))
            for name in sorted(self.told_to_stop & self.alive):
                self.alive.remove(name)
                self.obey(self.supervisor.process_exited(name, 0, self.now))
        assert self.supervisor.done


AnyHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyHistory = AnyHistory.TestCase
