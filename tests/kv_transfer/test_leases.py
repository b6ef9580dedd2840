"""Both ends of the lease, as state machines against plain models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.kv_transfer.leases import HeartbeatLog, Landed, Landings, LandingState, LoanBook

LEASE_S = 10.0
ENDED = (LandingState.LANDED, LandingState.FAILED)
PEERS, KEYS = st.sampled_from(["p", "q"]), st.sampled_from(["a", "b", "c"])


class Loans(RuleBasedStateMachine):
    """Every hold is given back exactly once, and not before the peer said so, is gone, or was silent for lease_s."""

    def __init__(self) -> None:
        super().__init__()
        self.book = LoanBook(LEASE_S)
        self.now = 0.0
        self.page = 0
        self.open: dict[tuple[str, Hashable], Counter[int]] = {}
        self.ended: set[tuple[str, Hashable]] = set()
        self.heard: dict[str, float] = {}

    @rule(peer=PEERS, key=KEYS, number=st.integers(0, 3), shared=st.booleans())
    def lend(self, peer: str, key: str, number: int, shared: bool) -> None:
        pages = [0] * number if shared else list(range(self.page + 1, self.page + 1 + number))
        self.page += number
        returned = self.book.lend(peer, key, pages, self.now)
        if (peer, key) in self.ended:
            assert returned == pages
        else:
            assert returned == []
            self.open.setdefault((peer, key), Counter()).update(pages)
            self.heard.setdefault(peer, self.now)

    @rule(peer=PEERS)
    def heartbeat(self, peer: str) -> None:
        self.book.renew(peer, self.now)
        self.heard[peer] = self.now

    @rule(peer=PEERS, key=KEYS)
    def land(self, peer: str, key: str) -> None:
        assert Counter(self.book.land(peer, key)) == self.open.pop((peer, key), Counter())
        self.ended.add((peer, key))
        assert self.book.land(peer, key) == []

    @rule(peer=PEERS)
    def drop(self, peer: str) -> None:
        assert Counter(self.book.drop_peer(peer)) == self._end(peer)
        assert self.book.drop_peer(peer) == []

    @rule(seconds=st.sampled_from([0.0, 1.0, LEASE_S - 0.5, LEASE_S]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        silent = [peer for peer, heard in self.heard.items() if self.now - heard >= LEASE_S]
        expected = sum((self._end(peer) for peer in silent), Counter())
        assert Counter(self.book.expire(self.now)) == expected
        assert self.book.expire(self.now) == []

    def _end(self, peer: str) -> Counter[int]:
        self.heard.pop(peer, None)
        keys = [name for name in self.open if name[0] == peer]
        self.ended.update(keys)
        return sum((self.open.pop(name) for name in keys), Counter())

    @invariant()
    def holds_agree(self) -> None:
        assert self.book.lent_pages == sum(pages.total() for pages in self.open.values())

    def teardown(self) -> None:
        for peer in ("p", "q"):
            self.book.drop_peer(peer)
        assert self.book.lent_pages == 0


class Reads(RuleBasedStateMachine):
    """A pool of pages, reads that write into them, and `Landings` in between: no page is recyclable while writable."""

    def __init__(self) -> None:
        super().__init__()
        self.landings = Landings(LEASE_S)
        self.now = 100.0
        self.free = set(range(40))
        self.keep: set[int] = set()  # landed pages, handed to the request
        self.writers: dict[str, list[int]] = {}  # reads the transport has not settled
        self.good: dict[str, bool] = {}  # by tag: arrived in time
        self.lent_at: dict[str, float] = {}
        self.reads: dict[str, list[str]] = {}  # by key, in order
        self.bound: dict[str, list[int]] = {}
        self.gone: set[str] = set()  # tags settled

    @rule(key=KEYS, first=st.integers(0, 3), number=st.integers(0, 6))
    def promise(self, key: str, first: int, number: int) -> None:
        if key in self.bound:
            with pytest.raises(ValueError):
                self.landings.promise(key, first, number)
            return
        self.landings.promise(key, first, number)
        self.bound[key], self.reads[key] = [], []

    @rule(key=KEYS, first=st.integers(0, 8), number=st.integers(0, 4), age=st.sampled_from([0.0, 6.0, LEASE_S + 1]))
    def ticket(self, key: str, first: int, number: int, age: float) -> None:
        if not self.landings.accepts(key, first, number):
            with pytest.raises(ValueError):
                self.landings.start(key, first, [99] * number, self.now)
            return
        if number > len(self.free):
            return
        pages = [self.free.pop() for _ in range(number)]
        tag = self.landings.start(key, first, pages, self.now - age)
        assert tag not in self.lent_at
        assert not self.landings.accepts(key, first, number)  # the same ticket again
        self.writers[tag], self.lent_at[tag] = pages, self.now - age
        self.reads[key].append(tag)
        self.bound[key] += pages

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), arrived=st.booleans())
    def settle(self, data: st.DataObject, arrived: bool) -> None:
        tag = data.draw(st.sampled_from(sorted(self.writers)))
        del self.writers[tag]
        self.good[tag] = arrived and self.now - self.lent_at[tag] < LEASE_S
        done = self.landings.read_done(tag, self.now) if arrived else self.landings.read_ended(tag)
        self._recycle(done)
        self.gone.add(tag)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        tag = data.draw(st.sampled_from(sorted(self.writers)))
        self._recycle(self.landings.read_stalled(tag))
        key = self._key_of(tag)
        assert key is None or self.landings.state(key) is LandingState.FAILED

    def _key_of(self, tag: str) -> str | None:
        """The hand-off of a read; None once it was taken."""
        return next((key for key, tags in self.reads.items() if tag in tags), None)

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Late and unknown events change nothing."""
        tag = data.draw(st.sampled_from([*sorted(self.gone), "never"]))
        before = {key: self.landings.state(key) for key in self.bound if self._key_of(tag) != key}
        assert self.landings.read_done(tag, self.now) == self.landings.read_ended(tag) == []
        assert before == {key: self.landings.state(key) for key in before}
        self.landings.complete("unknown")
        self.landings.fail("unknown")

    @rule(key=KEYS)
    def complete(self, key: str) -> None:
        self.landings.complete(key)

    @rule(key=KEYS)
    def fail(self, key: str) -> None:
        was = self.landings.state(key)
        self.landings.fail(key)
        assert self.landings.state(key) is (was if was in (None, LandingState.LANDED) else LandingState.FAILED)

    @rule(key=KEYS)
    def take(self, key: str) -> None:
        if self.landings.state(key) not in ENDED:
            with pytest.raises(ValueError):
                self.landings.take(key)
            return
        self._check(key, self.landings.take(key))
        assert self.landings.state(key) is None

    @rule(seconds=st.sampled_from([1.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def _check(self, key: str, outcome: Landed) -> None:
        reads, pages = self.reads.pop(key), self.bound.pop(key)
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


TestLoans = Loans.TestCase
TestLoans.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestReads = Reads.TestCase
TestReads.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_hand_off_lands() -> None:
    landings = Landings(LEASE_S)
    landings.promise("k", first_page=2, num_pages=3)
    assert landings.state("k") is LandingState.PROMISED
    first = landings.start("k", 2, [10, 11], lent_at=0.0)
    second = landings.start("k", 4, [5], lent_at=1.0)
    landings.complete("k")
    landings.read_done(second, 2.0)
    assert landings.state("k") is LandingState.READING
    landings.read_done(first, 9.9)
    assert landings.state("k") is LandingState.LANDED
    assert landings.take("k") == Landed(LandingState.LANDED, [10, 11, 5], [], [])


def test_leading_pages_survive_a_failure() -> None:
    landings = Landings(LEASE_S)
    landings.promise("k", 0, 5)
    tags = [landings.start("k", page, [page + 10], lent_at=0.0) for page in range(4)]
    landings.read_done(tags[0], 1.0)
    landings.read_stalled(tags[1])
    landings.read_done(tags[2], 1.0)
    assert landings.take("k") == Landed(LandingState.FAILED, landed=[10], idle=[12], quarantined=[11, 13])
    assert landings.quarantined_pages == 2
    assert landings.read_done(tags[3], 50.0) == [13]
    assert landings.read_ended(tags[1]) == [11]
    assert landings.quarantined_pages == 0


def test_pages_that_no_ticket_covered_fail_the_hand_off() -> None:
    landings = Landings(LEASE_S)
    landings.promise("k", 0, 2)
    landings.read_done(landings.start("k", 0, [1], lent_at=0.0), 1.0)
    landings.complete("k")
    assert landings.take("k") == Landed(LandingState.FAILED, [1], [], [])


@pytest.mark.parametrize(("finished_at", "trusted"), [(14.9, True), (15.0, False)])
def test_a_read_is_trusted_within_a_lease_of_the_heartbeat_the_lender_knew(finished_at: float, trusted: bool) -> None:
    beats = HeartbeatLog(started_at=0.0)
    beats.sent(1, 5.0)
    beats.sent(2, 8.0)  # the lender had not seen it
    landings = Landings(LEASE_S)
    landings.promise("k", 0, 1)
    tag = landings.start("k", 0, [1], beats.sent_at(1))
    landings.complete("k")
    landings.read_done(tag, finished_at)
    assert (landings.state("k") is LandingState.LANDED) == trusted
    # the lender, which saw heartbeat 1 at 5.0 at the earliest, has not recycled at a moment we trust
    book = LoanBook(LEASE_S)
    book.renew("p", 5.0)
    book.lend("p", "k", [1], 13.0)
    assert (book.expire(finished_at) == []) == trusted


def test_forgotten_heartbeats_are_not_trusted() -> None:
    beats = HeartbeatLog(started_at=3.0, remember=4)
    assert beats.sent_at(0) == 3.0
    for seq in range(1, 10):
        beats.sent(seq, 3.0 + seq)
    assert beats.sent_at(0) == beats.sent_at(5) == beats.sent_at(99) == float("-inf")
    assert beats.sent_at(9) == 12.0


def test_ended_keys_are_bounded() -> None:
    book = LoanBook(LEASE_S, remember=2)
    for key in range(5):
        book.land("p", key)
    assert book.lend("p", 4, [1], 0.0) == [1]
    assert book.lend("p", 0, [1], 0.0) == []
