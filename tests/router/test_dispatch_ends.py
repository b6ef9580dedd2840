"""How a request ends before its last token: no worker, no room, too late, cancelled, shut down."""

from __future__ import annotations

from typing import NoReturn

import pytest

from penstock.common.errors import Overloaded, QueueTimeout, Timeout, Unavailable
from penstock.router.dispatch import State
from penstock.router.dispatch_events import (
    Cancelled,
    Dequeue,
    Fail,
    Give,
    Place,
    Placed,
    PlaceFailed,
    Queued,
    Refused,
    Release,
    Reserve,
    SendAbort,
    SendSubmit,
    Shutdown,
    Submitted,
    Tick,
    WorkerAtWork,
    WorkerDown,
    WorkerUp,
)
from penstock.router.dispatch_state import WAIT_FOR_WORKER_S, Choice, Key
from penstock.router.policy import Placement
from tests.router.dispatching import Harness, delta, placement, request, the, worker


def test_who_waits_its_turn_goes_leaves_or_is_told_why_not():
    h = Harness()
    h.do(WorkerUp("d1"), Submitted(request(), "sink"))
    assert h.do(Queued("a", 0)) == [] and h.core.choices["a", 0].state is State.QUEUED
    assert h.do(WorkerDown("d1"), WorkerUp("d1"), Tick()) == [], "it is the queue's, not the workers'"
    assert [type(c) for c in h.do(Placed("a", 0, 0, placement("d1")))] == [Reserve, SendSubmit]
    for event, code in ((Refused("b", 0, Overloaded("no")), "overloaded"), (Shutdown(), "unavailable")):
        h.do(Submitted(request("b"), "sink"), Queued("b", 0))
        commands = h.do(event)
        assert the(Fail, [c for c in commands if isinstance(c, Fail)][-1:]).error.code == code
        assert Dequeue("b", 0) in commands
    h.do(Submitted(request("c"), "sink"), Queued("c", 0))
    h.now += 61.0
    fail, dequeue = h.do(Tick())
    assert type(fail.error) is QueueTimeout and dequeue == Dequeue("c", 0)
    h.do(Submitted(request("d"), "sink"))
    assert h.do(Cancelled("d", 0)) == [] and h.do(Queued("d", 0)) == [Dequeue("d", 0)]


def test_without_a_worker_a_request_waits_a_while():
    h = Harness()
    h.do(Submitted(request(), "sink"))
    assert h.do(Placed("a", 0, 0, None)) == []
    h.now += WAIT_FOR_WORKER_S / 2
    assert the(Place, h.do(WorkerUp("d1"))).request.attempt == 0
    assert h.do(WorkerUp("d2")) == [], "it is being placed"
    h.do(Placed("a", 0, 0, None))
    h.now += WAIT_FOR_WORKER_S + 0.1
    assert isinstance(the(Fail, h.do(Tick())).error, Unavailable)


def test_a_request_waits_for_a_worker_no_longer_than_for_room():
    h = Harness()
    h.do(Submitted(request(queue_timeout_s=2.0), "sink"), Placed("a", 0, 0, None))
    h.now += 1.9
    assert h.do(Tick()) == []
    h.now += 0.2
    assert str(the(Fail, h.do(Tick())).error) == "no worker came up within 2 s"


def test_few_may_wait():
    h = Harness(max_waiting=1)
    for name in ("a", "b"):
        h.do(Submitted(request(name), name))
        h.do(Placed(name, 0, 0, None))
    assert the(Fail, h.all).sink == "b"
    h.do(Cancelled("a", 0), Submitted(request("c"), "c"), Placed("c", 0, 0, None))
    assert [fail.sink for fail in h.all if isinstance(fail, Fail)] == ["b"], "one that has left makes room"


def test_who_comes_to_wait_costs_no_look_at_all_others():
    """When the last worker is lost all that ran there come to wait at once, and the router stood still meanwhile."""

    class Unseen(dict[Key, Choice]):
        def values(self) -> NoReturn:
            raise AssertionError("all were looked at")

    h = Harness()
    h.core.choices = Unseen()
    h.do(Submitted(request(), "sink"), Placed("a", 0, 0, None))
    assert the(Place, h.do(WorkerUp("d1"))).request.request_id == "a"


@pytest.mark.parametrize("queued_s", [0, 50])
def test_each_state_has_the_time_that_it_may_take(queued_s: int):
    h = Harness()
    h.do(WorkerUp("d1"), Submitted(request(), "sink"))
    h.now += 60 + 29  # to be placed
    assert h.do(Tick()) == []
    if queued_s:
        h.do(Queued("a", 0))
        h.now += queued_s
        assert h.do(Tick()) == []
    h.do(Placed("a", 0, 0, placement("d1")))
    h.now += 60 + 29  # to get room, and say something
    assert h.do(Tick()) == []
    h.now += 2
    assert type(the(Fail, h.do(Tick())).error) is Timeout


def test_a_request_that_nobody_answers_the_question_of_ends():
    h = Harness()
    h.do(WorkerUp("d1"), Submitted(request(), "sink"))
    h.now += 60 + 31
    assert type(the(Fail, h.do(Tick())).error) is Timeout


def test_progress_moves_the_deadline():
    h = Harness()
    h.run()
    h.now += 60 + 29  # queue timeout and progress timeout together
    assert h.do(Tick()) == []
    h.tokens(delta(0, 5), delta(1, 6))
    h.now += 29
    assert h.do(Tick()) == []
    h.tokens(delta(2, 7))
    h.now += 29
    assert h.do(Tick()) == []
    h.now += 2
    commands = h.do(Tick())
    assert isinstance(the(Fail, commands).error, Timeout) and the(SendAbort, commands).incarnation == "d1"
    assert h.reserved() == {}


def test_a_worker_at_work_takes_no_time_from_who_waits_for_room_there():
    h = Harness()
    h.run(prefill="p1")
    h.do(WorkerAtWork("p1"))
    h.now += 60 + 29
    assert h.do(Tick()) == []


@pytest.mark.parametrize("computing", ["p1", "d1"])
def test_a_long_prompt_is_not_late_while_its_worker_computes(computing: str):
    h = Harness()
    h.run(prefill="p1")
    for _ in range(20):  # 500 s, where 90 without a token are too many
        h.now += 25.0
        assert h.do(WorkerAtWork(computing), Tick()) == []
    h.now += 25.0
    assert h.do(WorkerAtWork("p2"), Tick()) == [], "what others do says nothing, and it is not late yet"
    h.now += 25.0
    assert type(the(Fail, h.do(WorkerAtWork("p2"), Tick())).error) is Timeout


def test_a_later_attempt_may_take_as_long():
    h = Harness()
    h.run(prefill="p1", max_tokens=2000)
    h.do(WorkerUp("d2"))
    for index in range(1000):  # more than five hours
        h.now += 20.0
        h.tokens(delta(index, 5))
    the(Place, h.do(WorkerDown("d1")))
    h.do(Placed("a", 0, 1, placement("d2")))
    for _ in range(20):
        h.now += 25.0
        assert h.do(WorkerAtWork("d2"), Tick()) == []


def test_a_request_that_a_busy_worker_has_forgotten_ends_at_last():
    h = Harness()
    h.run(prefill="p1")
    minutes = 0
    while not (commands := h.do(WorkerAtWork("p1"), Tick())):
        h.now += 60.0
        minutes += 1
        assert minutes < 100
    assert type(the(Fail, commands).error) is Timeout and minutes > 10


def test_pages_that_move_slowly_are_not_late_though_the_first_token_is_there():
    h = Harness()
    h.run(prefill="p1")
    h.tokens(delta(0, 5))
    for _ in range(20):
        h.now += 25.0
        assert h.do(WorkerAtWork("d1"), Tick()) == []
    h.tokens(delta(1, 6))
    h.now += 31.0
    assert type(the(Fail, h.do(WorkerAtWork("d1"), Tick())).error) is Timeout, "now it decodes"


@pytest.mark.parametrize(("prefill", "came"), [(None, 0), ("p1", 1)])
def test_a_token_that_is_missing_is_missed_however_busy_its_worker_is(prefill: str | None, came: int):
    h = Harness()
    h.run(prefill=prefill)
    h.tokens(delta(came, 5))  # of the decode worker: the first one, or one that is too early
    h.now += 91.0
    assert type(the(Fail, h.do(WorkerAtWork("d1"), Tick())).error) is Timeout


def test_cancel_in_every_state():
    for state in State:
        h = Harness()
        h.do(Submitted(request(), "sink"))
        if state is State.QUEUED:
            h.do(Queued("a", 0))
        elif state is not State.PLACING:
            h.do(Placed("a", 0, 0, placement("d1") if state is State.RUNNING else None))
        assert h.core.choices["a", 0].state is state
        commands = h.do(Cancelled("a", 0))
        expected = {State.RUNNING: [SendAbort, Release, Give], State.QUEUED: [Dequeue]}
        assert [type(c) for c in commands] == expected.get(state, [])
        assert not h.core.choices and h.do(Cancelled("a", 0)) == []
        answer = h.do(Placed("a", 0, 0, placement("d1")))
        assert {type(c) for c in answer} == {Give}, "the answer to a cancelled question"
        assert h.do(Placed("a", 0, 0, None), PlaceFailed("a", 0, 0), Refused("a", 0, Overloaded("no"))) == []


def test_a_failure_of_ours_while_placing_is_answered():
    h = Harness()
    h.do(Submitted(request(), "sink"))
    assert the(Fail, h.do(PlaceFailed("a", 0, 0))).error.code == "internal_error" and not h.core.choices


def test_shutdown_in_every_state():
    for state in State:
        h = Harness()
        h.do(Submitted(request(), "sink"))
        if state is State.QUEUED:
            h.do(Queued("a", 0))
        elif state is not State.PLACING:
            h.do(Placed("a", 0, 0, placement("d1") if state is State.RUNNING else None))
        commands = h.do(Shutdown())
        assert isinstance(the(Fail, commands).error, Unavailable)
        assert [type(c) for c in commands].count(SendAbort) == (state is State.RUNNING)
        assert not h.core.choices and h.reserved() == {}


def test_what_was_not_begun_does_not_count_as_given():
    chosen = Placement(worker("d1"), worker("p1", "prefill"), 10, 20, prefill_ms=7.0, decode_ms=5.0)
    h = Harness()
    h.do(WorkerUp("d1"), Submitted(request(), "sink"), Placed("a", 0, 0, chosen))
    assert [c for c in h.do(Cancelled("a", 0)) if isinstance(c, Give)] == [Give("p1", -7.0), Give("d1", -5.0)]
    h.do(Submitted(request(), "sink"), Cancelled("a", 0))
    assert h.do(Placed("a", 0, 0, chosen)) == [Give("p1", -7.0), Give("d1", -5.0)]
    h.do(Submitted(request(), "sink"), Placed("a", 0, 0, chosen))
    h.tokens(delta(0, 5))
    assert [c for c in h.do(Cancelled("a", 0)) if isinstance(c, Give)] == [Give("d1", -5.0)], "the prompt is computed"
