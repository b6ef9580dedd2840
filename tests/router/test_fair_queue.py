"""Fair queueing: shares, priorities, and that what is read off the order comes true."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.router.fair_queue import FEW, FairQueue

WEIGHTS = {"a": 1.0, "b": 3.0}
COST = st.integers(1, 100).map(float)
TENANT = st.sampled_from(["a", "b", "c"])
ARRIVALS = st.lists(st.tuples(TENANT, st.integers(-2, 2), COST), max_size=40)


def filled(arrivals: list[tuple[str, int, float]]) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue(WEIGHTS)
    for number, (tenant, priority, cost) in enumerate(arrivals):
        queue.push(queue.place(number, tenant, priority, cost, tenant))
    return queue


def drained(queue: FairQueue[str]) -> list[int]:
    keys = []
    while (place := queue.pop()) is not None:
        keys.append(place.key)
    return keys


@given(st.lists(COST, min_size=60, max_size=60), st.lists(COST, min_size=60, max_size=60))
def test_two_that_always_want_more_get_what_they_weigh(light, heavy):
    queue = filled([("a", 0, cost) for cost in light] + [("b", 0, cost) for cost in heavy])
    served: Counter[str] = Counter()
    rest = Counter({"a": sum(light), "b": sum(heavy)})
    while (place := queue.pop()) is not None:
        served[place.tenant] += place.cost
        rest[place.tenant] -= place.cost
        if min(rest.values()) <= 0:
            break
        assert abs(served["b"] / 3 - served["a"]) <= 100 + 100 / 3, "never more than one request apart"


@given(st.lists(COST, max_size=30))
def test_one_alone_is_served_in_order(costs):
    assert drained(filled([("a", 0, cost) for cost in costs])) == list(range(len(costs)))


@given(ARRIVALS)
def test_urgent_ones_go_first_whoever_sent_them(arrivals):
    order = drained(filled(arrivals))
    priorities = [arrivals[key][1] for key in order]
    assert priorities == sorted(priorities) and sorted(order) == list(range(len(arrivals)))


@given(ARRIVALS, TENANT, st.integers(-2, 2), COST)
def test_what_stands_ahead_is_what_goes_before(arrivals, tenant, priority, cost):
    queue = filled(arrivals)
    place = queue.place("new", tenant, priority, cost, tenant)
    ahead = queue.ahead(place)
    queue.push(place)
    order = drained(queue)
    assert ahead == sum(arrivals[key][2] for key in order[: order.index("new")])


@given(st.lists(COST, min_size=1, max_size=200), COST)
def test_a_newcomer_does_not_wait_for_anothers_backlog(backlog, cost):
    queue = filled([("a", 0, one) for one in backlog])
    ahead = queue.ahead(queue.place("new", "c", 0, cost, "c"))
    assert ahead <= cost, "before its turn the other one gets as much as it asks for, at most"


@given(st.integers(1, 20))
def test_the_last_is_of_whoever_wants_most_for_its_share(number):
    queue = filled([("a", 0, 10.0)] * number + [("b", 0, 10.0)] * (3 * number + 2))
    assert queue.pop_last().tenant == "b"
    assert queue.pop_last().tenant == "b"
    queue = filled([("b", 5, 1.0), ("a", 0, 100.0)])
    assert queue.pop_last().tenant == "b", "less urgent ones come before that"


def test_weights_and_keys_are_checked():
    with pytest.raises(ValueError, match="above 0"):
        FairQueue({"a": 0.0})
    queue = filled([("a", 0, 1.0)])
    with pytest.raises(ValueError, match="waits already"):
        queue.push(queue.place(0, "a", 0, 1.0, "a"))


def test_a_queue_that_is_never_empty_does_not_remember_all_who_have_ever_waited():
    queue = filled([("a", 0, 1.0)] * 3)
    for number in range(3, 1000):  # each with a priority of its own
        queue.push(queue.place(number, f"tenant {number % 7}", -number, 1.0, "b"))
        assert queue.pop().key == number
    assert len(queue) == 3 and len(queue._last) <= 2 * len(queue) + FEW + 1 and len(queue._now) <= len(queue._last)
    assert [queue.pop().start for _ in range(3)] == [0.0, 1.0, 2.0]


def test_who_comes_last_does_not_look_at_all_before_it():
    """A program asks for thousands of answers at once: its router stood still until each had looked at all others."""
    looks = []

    class Cost(float):
        def __radd__(self, other: float) -> float:
            looks.append(self)
            return float(self) + other

    queue = filled([("a", 0, Cost(3)) for _ in range(100)])
    looks.clear()
    assert queue.ahead(queue.place("last", "a", 0, 1.0, "a")) == 300 and not looks


class Random(RuleBasedStateMachine):
    """Anything in any order: nobody is lost, nobody comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[str] = FairQueue(WEIGHTS)
        self.waiting: dict[int, float] = {}  # what they cost
        self.number = 0

    @rule(tenant=TENANT, priority=st.integers(0, 1), cost=COST)
    def push(self, tenant: str, priority: int, cost: float) -> None:
        self.queue.push(self.queue.place(self.number, tenant, priority, cost, tenant))
        self.waiting[self.number] = cost
        self.number += 1

    @precondition(lambda self: self.waiting)
    @rule(back=st.booleans())
    def pop(self, back: bool) -> None:
        place = self.queue.pop()
        assert place is not None and place.key in self.waiting
        if back:
            self.queue.push(place)
            again = self.queue.pop()
            assert again is not None and again.key == place.key, "it stays the first"
        del self.waiting[place.key]

    @precondition(lambda self: self.waiting)
    @rule()
    def pop_last(self) -> None:
        del self.waiting[self.queue.pop_last().key]

    @precondition(lambda self: self.number)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.integers(0, self.number - 1))
        assert self.queue.remove(key) == (key in self.waiting)
        self.waiting.pop(key, None)

    @invariant()
    def all_there(self) -> None:
        assert len(self.queue) == len(self.waiting) and all(key in self.queue for key in self.waiting)
        last = self.queue.place("last", "a", 2, 1.0, "")
        assert self.queue.ahead(last) == sum(self.waiting.values())


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=60, deadline=None)
