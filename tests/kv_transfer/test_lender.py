"""The lender as a state machine against a plain model, and in which order it gives pages back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.common.messages import Fetch, FetchDone, Message, PagesReady
from penstock.engine.pages import PageManager
from penstock.kv_transfer.jobs import Sealed
from penstock.kv_transfer.lender import Lender, Loan
from tests.kv_transfer.noting import NotingMover

PEERS, KEYS = st.sampled_from([b"p/1", b"q/1"]), st.sampled_from(["a", "b", "c"])
Name = tuple[bytes, str]


class Loans(RuleBasedStateMachine):
    """Pages of a loan are held until its reader says so or is gone, and go then; tickets go out sealed and in order."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageManager(40, 4)
        self.mover = NotingMover()
        mover: Any = self.mover
        self.lender = Lender(self.pages, mover, self._sent, page_bytes=64, checksum="all")
        self.loans: dict[Name, Loan] = {}
        self.offered: dict[Name, list[int]] = {}  # pages of loans that are out
        self.ticketed: dict[Name, list[int]] = {}
        self.closed: set[Name] = set()
        self.told: set[Name] = set()  # that no ticket comes any more
        self.dropped: set[Name] = set()
        self.expired = 0

    def _sent(self, identity: bytes, message: Message) -> None:
        assert isinstance(message, (PagesReady, FetchDone))
        name = identity, message.request_id
        if isinstance(message, FetchDone):
            assert self.ticketed[name] == self.offered[name], "before the last ticket"
            assert name in self.closed - self.told - self.dropped
            self.told.add(name)
            return
        assert message.checksums == [message.pages[0]], "of other pages"
        assert message.first_page == len(self.ticketed[name])
        self.ticketed[name] += message.pages[0]
        assert self.offered[name][: len(self.ticketed[name])] == self.ticketed[name]

    @rule(peer=PEERS, key=KEYS)
    def ask(self, peer: bytes, key: str) -> None:
        """A second time, too: then the first is over."""
        self.loans[peer, key] = self.lender.open(peer, key, key, 0, 0, 0, 0.0)
        self.offered[peer, key], self.ticketed[peer, key] = [], []
        for names in (self.closed, self.told, self.dropped):
            names.discard((peer, key))

    @rule(peer=PEERS, key=KEYS, number=st.integers(0, 3))
    def offer(self, peer: bytes, key: str, number: int) -> None:
        name = peer, key
        if name not in self.loans or name in self.closed or number > self.pages.num_available:
            return
        pages = self.pages.allocate("prompt", number)
        self.lender.offer(self.loans[name], pages, 0, 0.0)
        if not self.loans[name].ended:
            self.offered[name] += pages
        self.pages.release("prompt")

    @precondition(lambda self: self.mover.seals)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        """In any order, and those of loans that have ended, too."""
        job = self.mover.seals.pop(data.draw(st.integers(0, len(self.mover.seals) - 1)))
        self.lender.sealed(Sealed(job.tag, list(job.pages)), 0.0)

    @rule(peer=PEERS, key=KEYS)
    def close(self, peer: bytes, key: str) -> None:
        name = peer, key
        if name in self.loans and name not in self.closed and not self.loans[name].ended:
            self.closed.add(name)
            done = FetchDone(request_id=key, attempt=0, num_pages=0)
            self.lender.close(self.loans[name], lambda now: done, 0.0)

    @rule(peer=PEERS, key=KEYS)
    def drop(self, peer: bytes, key: str) -> None:
        if (peer, key) in self.loans:
            self.lender.drop(self.loans[peer, key])
            self.dropped.add((peer, key))

    @rule(peer=PEERS, key=KEYS)
    def land(self, peer: bytes, key: str) -> None:
        self.lender.landed(peer, key)
        self._forget(peer, key)

    @rule(peer=PEERS)
    def gone(self, peer: bytes) -> None:
        self.lender.peer_gone(peer)
        for name in [name for name in self.loans if name[0] == peer]:
            self.expired += bool(self.offered[name])
            self._forget(*name)

    def _forget(self, peer: bytes, key: str) -> None:
        loan = self.loans.pop((peer, key), None)
        assert loan is None or loan.ended
        self.offered.pop((peer, key), None)

    @invariant()
    def held_as_long_as_lent(self) -> None:
        self.pages.check()
        out = [pages for pages in self.offered.values() if pages]
        assert sorted(map(sorted, out)) == sorted(sorted(row["pages"]) for row in self.lender.rows(0.0) if row["pages"])  # type: ignore[call-overload]
        assert self.lender.lent_pages == self.pages.num_held == sum(map(len, out))
        assert self.lender.expired == self.expired

    @invariant()
    def what_is_sealed_is_told(self) -> None:
        if not self.mover.seals:
            for name in self.loans.keys() - self.dropped:
                assert self.ticketed[name] == self.offered[name]
                assert (name in self.told) == (name in self.closed)

    def teardown(self) -> None:
        for peer in (b"p/1", b"q/1"):
            self.lender.peer_gone(peer)
        assert self.pages.num_held == 0 and self.lender.rows(0.0) == []


TestLoans = Loans.TestCase
TestLoans.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    """Others may share the beginning: a loan that ends gives its pages back last ones first."""
    pages = PageManager(4, 4)
    mover: Any = NotingMover()
    lender = Lender(pages, mover, lambda identity, message: None, page_bytes=64, checksum="off")
    names = [b"0", b"1", b"2"]
    held = pages.allocate("prompt", 3)
    for page, name in zip(held, names, strict=True):
        pages.name(page, name)
    loan = lender.open(b"p/1", "a", "a", 0, 0, 0, 0.0)
    lender.offer(loan, held, 12, 0.0)
    pages.release("prompt")
    lender.landed(b"p/1", "a")
    pages.allocate("other", 2)  # the empty one, and one that is evicted
    assert pages.match(names) == held[:2]


def test_a_prefix_is_lent_in_tickets_of_a_size_once_and_only_what_nobody_was_promised() -> None:
    pages = PageManager(8, 4)
    mover: Any = NotingMover()
    sent: list[Message] = []
    lender = Lender(pages, mover, lambda identity, message: sent.append(message), page_bytes=16 << 20, checksum="off")
    names = [b"0", b"1", b"2", b"3", b"4"]
    for page, name in zip(pages.allocate("prompt", 5), names, strict=True):
        pages.name(page, name)
    cached = list(pages.table("prompt"))
    pages.release("prompt")
    pages.promise("other", 5)
    for _ in range(2):
        lender.fetch(b"p/1", "a", Fetch(request_id="a", attempt=0, first_page=7, hashes=[*names, b"unknown"]), 0.0)
    first, second, done = sent
    assert isinstance(first, PagesReady) and isinstance(second, PagesReady)
    assert [(t.first_page, t.pages[0], t.num_tokens) for t in (first, second)] == [
        (7, cached[:2], 36),
        (9, cached[2:3], 40),
    ]
    assert isinstance(done, FetchDone) and done.num_pages == 3 and lender.lent_pages == 3
    lender.landed(b"p/1", "a")
    assert pages.num_held == 0 and len(pages.allocate("other", 5)) == 5


@pytest.mark.parametrize(("checksum", "checked"), [("off", 0), ("sample", 2), ("all", 17)])
def test_how_many_loans_are_checked(checksum: str, checked: int) -> None:
    pages = PageManager(20, 4)
    mover: Any = NotingMover()
    lender = Lender(pages, mover, lambda identity, message: None, page_bytes=64, checksum=checksum)
    for number in range(17):
        loan = lender.open(b"p/1", str(number), "a", 0, number, 0, 0.0)
        lender.offer(loan, pages.allocate("prompt", 1), 4, 0.0)
    assert len(mover.seals) == checked and mover.readers_expected == 17 - checked
