"""The reader's side of a lease: what comes in, as a state machine against a plain model, and how long it is trusted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.kv_transfer.leases import CLOCKS_AGREE, Landed, Landings, LandingState, SessionLease

LEASE_S = 10.0
ENDED = (LandingState.LANDED, LandingState.FAILED)
KEYS = st.sampled_from(["a", "b", "c"])


@dataclass
class Expected:
    """What a hand-off has been told."""

    next_page: int
    end_page: int
    complete: bool = False
    failed: bool = False
    state: LandingState = LandingState.PROMISED


class Reads(RuleBasedStateMachine):
    """A pool of pages, reads that write into them, and `Landings` in between: no page is recyclable while writable."""

    def __init__(self) -> None:
        super().__init__()
        self.landings = Landings()
        self.free = set(range(40))
        self.keep: set[int] = set()  # landed pages, handed to the request
        self.writers: dict[str, list[int]] = {}  # reads the transport has not settled
        self.good: dict[str, bool] = {}  # by tag: arrived in time
        self.tags: set[str] = set()
        self.reads: dict[str, list[str]] = {}  # by key, in order
        self.bound: dict[str, list[int]] = {}
        self.expected: dict[str, Expected] = {}
        self.gone: set[str] = set()  # tags settled

    @rule(key=KEYS, first=st.integers(0, 3), number=st.integers(0, 6))
    def promise(self, key: str, first: int, number: int) -> None:
        if key in self.bound:
            with pytest.raises(ValueError):
                self.landings.promise(key, first, number)
            return
        self.landings.promise(key, first, number)
        self.bound[key], self.reads[key] = [], []
        self.expected[key] = Expected(first, first + number)

    @rule(key=KEYS, off=st.sampled_from([0, 0, 0, 0, -1, 1]), number=st.integers(0, 4))
    def ticket(self, key: str, off: int, number: int) -> None:
        told = self.expected.get(key)
        first = off + (told.next_page if told is not None else 0)
        wanted = told is not None and told.state not in ENDED and told.next_page == first
        assert self.landings.accepts(key, first, number) == (wanted and 0 < number <= told.end_page - first)
        if not self.landings.accepts(key, first, number):
            with pytest.raises(ValueError):
                self.landings.start(key, first, [99] * number)
            return
        if number > len(self.free):
            return
        pages = [self.free.pop() for _ in range(number)]
        tag = self.landings.start(key, first, pages)
        assert tag not in self.tags
        assert not self.landings.accepts(key, first, number)  # the same ticket again
        self.writers[tag] = pages
        self.tags.add(tag)
        self.reads[key].append(tag)
        self.bound[key] += pages
        self.expected[key].next_page += number

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), arrived=st.booleans())
    def settle(self, data: st.DataObject, arrived: bool) -> None:
        tag = data.draw(st.sampled_from(sorted(self.writers)))
        del self.writers[tag]
        self.good[tag] = arrived
        done = self.landings.read_done(tag) if arrived else self.landings.read_ended(tag)
        self._recycle(done)
        self.gone.add(tag)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        tag = data.draw(st.sampled_from(sorted(self.writers)))
        self._recycle(self.landings.read_stalled(tag))
        key = self._key_of(tag)
        if key is not None:
            self.expected[key].failed = True

    def _key_of(self, tag: str) -> str | None:
        """The hand-off of a read; None once it was taken."""
        return next((key for key, tags in self.reads.items() if tag in tags), None)

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Late and unknown events change nothing."""
        tag = data.draw(st.sampled_from([*sorted(self.gone), "never"]))
        assert self.landings.read_done(tag) == self.landings.read_ended(tag) == []
        assert self.landings.read_stalled("never") == []
        self.landings.complete("unknown")
        self.landings.fail("unknown")

    @rule(key=KEYS, end_page=st.none() | st.integers(0, 9))
    def complete(self, key: str, end_page: int | None) -> None:
        self.landings.complete(key, end_page)
        if key in self.expected:
            told = self.expected[key]
            told.complete = True
            told.end_page = told.end_page if end_page is None else min(told.end_page, end_page)

    @rule(key=KEYS)
    def fail(self, key: str) -> None:
        self.landings.fail(key)
        if key in self.expected:
            self.expected[key].failed = True

    @rule(key=KEYS)
    def take(self, key: str) -> None:
        if self.landings.state(key) not in ENDED:
            with pytest.raises(ValueError):
                self.landings.take(key)
            return
        self._check(key, self.landings.take(key))
        assert self.landings.state(key) is None

    def _check(self, key: str, outcome: Landed) -> None:
        reads, pages = self.reads.pop(key), self.bound.pop(key)
        del self.expected[key]
        writable = {page for written in self.writers.values() for page in written}
        assert sorted(outcome.landed + outcome.idle + outcome.quarantined) == sorted(pages)
        assert set(outcome.quarantined) == writable & set(pages)
        assert outcome.landed == pages[: len(outcome.landed)]
        leading = 0
        while leading < len(reads) and self.good.get(reads[leading], False):
            leading += 1
        assert (outcome.state is LandingState.LANDED) <= (leading == len(reads))
        self._recycle(outcome.idle)
        self._recycle(outcome.landed)

    def _recycle(self, pages: list[int]) -> None:
        writable = {page for written in self.writers.values() for page in written}
        assert not writable & set(pages), "recycled while a read may write it"
        assert not self.free & set(pages), "recycled twice"
        self.free |= set(pages)

    @invariant()
    def landed_and_failed_are_for_good(self) -> None:
        for key, told in self.expected.items():
            good = [self.good.get(tag) for tag in self.reads[key]]
            if told.state not in ENDED:
                if told.failed or False in good or (told.complete and told.next_page != told.end_page):
                    told.state = LandingState.FAILED
                elif told.complete and all(good):
                    told.state = LandingState.LANDED
                else:
                    told.state = LandingState.READING if good else LandingState.PROMISED
            assert self.landings.state(key) is told.state

    @invariant()
    def nothing_is_lost(self) -> None:
        bound = sum(len(pages) for pages in self.bound.values())
        assert len(self.free) + bound + self.landings.quarantined_pages == 40

    def teardown(self) -> None:
        for key in list(self.bound):
            self.landings.fail(key)
            self._check(key, self.landings.take(key))
        for tag in list(self.writers):
            del self.writers[tag]
            self._recycle(self.landings.read_ended(tag))
        assert len(self.free) == 40
        assert self.landings.quarantined_pages == 0


TestReads = Reads.TestCase
TestReads.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_hand_off_lands() -> None:
    landings = Landings()
    landings.promise("k", first_page=2, num_pages=3)
    assert landings.state("k") is LandingState.PROMISED
    first = landings.start("k", 2, [10, 11])
    second = landings.start("k", 4, [5])
    landings.complete("k")
    landings.read_done(second)
    assert landings.state("k") is LandingState.READING
    landings.read_done(first)
    assert landings.state("k") is LandingState.LANDED
    assert landings.take("k") == Landed(LandingState.LANDED, [10, 11, 5], [], [])
    assert landings.read_ended(first) == landings.read_stalled(second) == [], "late"


def test_leading_pages_survive_a_failure() -> None:
    landings = Landings()
    landings.promise("k", 0, 5)
    tags = [landings.start("k", page, [page + 10]) for page in range(4)]
    landings.read_done(tags[0])
    landings.read_stalled(tags[1])
    landings.read_done(tags[2])
    assert landings.take("k") == Landed(LandingState.FAILED, landed=[10], idle=[12], quarantined=[11, 13])
    assert landings.quarantined_pages == 2
    assert landings.read_done(tags[3]) == [13]
    assert landings.read_ended(tags[1]) == [11]
    assert landings.quarantined_pages == 0


def test_pages_that_no_ticket_covered_fail_the_hand_off() -> None:
    landings = Landings()
    landings.promise("k", 0, 2)
    landings.read_done(landings.start("k", 0, [1]))
    landings.complete("k")
    assert landings.take("k") == Landed(LandingState.FAILED, [1], [], [])


def test_a_lender_that_has_fewer_pages_than_were_wanted_says_so() -> None:
    landings = Landings()
    for key, end_page in (("all", 3), ("more", 9), ("fewer", 1), ("left out", 2)):
        landings.promise(key, 0, 3)
        landings.read_done(landings.start(key, 0, [1] if end_page < 3 else [1, 2, 3]))
        landings.complete(key, end_page)
    ended = {key: landings.state(key) for key in ("all", "more", "fewer", "left out")}
    assert [key for key, state in ended.items() if state is LandingState.FAILED] == ["left out"]
    assert landings.take("fewer") == Landed(LandingState.LANDED, [1], [], [])


def test_a_hand_off_that_was_given_up_takes_nothing_more_in() -> None:
    landings = Landings()
    landings.promise("k", 0, 2)
    tag = landings.start("k", 0, [7])
    landings.fail("k")
    assert not landings.accepts("k", 1, 1)
    landings.read_done(tag)
    landings.complete("k", 1)
    assert landings.take("k") == Landed(LandingState.FAILED, [7], [], [])


def test_a_session_is_leased_from_when_what_was_answered_had_been_sent() -> None:
    lease = SessionLease(LEASE_S, started_at=0.0)
    assert lease.until == float("-inf"), "nobody has said that the Hello came"
    lease.answered(0)
    assert lease.until == LEASE_S * CLOCKS_AGREE < LEASE_S
    lease.sent(1, 5.0)
    lease.sent(2, 8.0)
    assert lease.until == LEASE_S * CLOCKS_AGREE
    for _ in range(2):
        lease.answered(1)
        assert lease.until == 5.0 + LEASE_S * CLOCKS_AGREE
    lease.answered(7)  # never sent
    assert lease.until == 5.0 + LEASE_S * CLOCKS_AGREE
    lease.answered(2)
    assert lease.until == 8.0 + LEASE_S * CLOCKS_AGREE
    assert lease.proven == 7
    lease.sent(8, 10.0)
    lease.sent(9, 11.0)
    for seq in (9, 8):
        lease.answered(seq)
        assert (lease.proven, lease.until) == (9, 11.0 + LEASE_S * CLOCKS_AGREE), "what came late takes nothing back"
