"""Hand-offs coming in, with a mover and links that only take notes."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from penstock.common.messages import (
    Abort,
    FetchDone,
    Finish,
    GenerateRequest,
    MeasuredRates,
    PagesLanded,
    PagesReady,
    Prefill,
    PrefillDone,
    PrefillFailed,
)
from penstock.common.page_hash import page_hashes, root_hash
from penstock.common.sampling import SamplingParams
from penstock.engine.pages import PageManager
from penstock.kv_transfer.cuda_ipc import IpcPool
from penstock.kv_transfer.leases import Landings
from penstock.kv_transfer.mover import (
    ConnectFailed,
    ReadDone,
    ReadFailed,
    ReadJob,
    ReadMismatch,
    ReadSettled,
    ReadStalled,
)
from penstock.kv_transfer.peer_links import LinkEvent, PeerFound, PeerLost
from penstock.kv_transfer.peer_transports import PeerTransports
from penstock.kv_transfer.reader import QUARANTINE, Reader
from penstock.kv_transfer.reading import Wanted
from penstock.kv_transfer.shm import host_id
from tests.kv_transfer.noting import NotingLinks, NotingMover, nixl_worker

LENDER = nixl_worker("prefill-0", "p1")


class Case:
    """A decode worker that has just asked prefill-0 for a prompt of 10 tokens: pages of 4, 4 and 2."""

    def __init__(self, num_pages: int = 16) -> None:
        self.pages = PageManager(num_pages, 4)
        self.mover = NotingMover()
        self.links = NotingLinks()
        self.reader = Reader(
            pages=self.pages,
            mover=self.mover,  # type: ignore[arg-type]
            links=self.links,  # type: ignore[arg-type]
            landings=Landings(),
            transports=PeerTransports(["nixl"], "auto"),
        )
        tokens = list(range(10))
        self.request = GenerateRequest(request_id="r", prompt_token_ids=tokens, sampling=SamplingParams())
        self.wanted = Wanted("r:0:0", "r", 0, 0, 0, 3, 10, list(page_hashes(root_hash("t"), tokens, 4)))
        self.key = self.wanted.key
        self.ask()
        self.event(PeerFound(LENDER))

    def ask(self, now: float = 0.0) -> None:
        self.pages.promise(self.key, 3)
        self.reader.hand_off(self.wanted, LENDER, Prefill(request=self.request, router_id="router"), now)

    def event(self, event: LinkEvent, now: float = 1.0) -> None:
        self.reader.link_event("p1", event, now)

    def ticket(
        self, first_page: int, count: int, num_tokens: int, now: float = 1.0, *, checked: bool = True
    ) -> ReadJob | None:
        before = set(self.mover.jobs)
        src = list(range(40 + first_page, 40 + first_page + count))
        message = PagesReady(
            request_id="r",
            attempt=0,
            first_page=first_page,
            pages=[src],
            checksums=[[7] * count] if checked else [],
            num_tokens=num_tokens,
        )
        self.event(message, now)
        new = set(self.mover.jobs) - before
        return self.mover.jobs[new.pop()] if new else None

    def read(self, first_page: int, count: int, num_tokens: int, now: float = 1.0) -> ReadJob:
        job = self.ticket(first_page, count, num_tokens, now)
        assert job is not None
        return job

    def done(self, job: ReadJob, at: float = 2.0) -> None:
        self.reader.completed(ReadDone(job.tag, 64 * len(job.dst_pages), 0.1, at), at)

    def first_token(self, held_ms: float = 0.0) -> None:
        self.event(PrefillDone(request_id="r", attempt=0, token_ids=[42], held_ms=held_ms), 3.0)

    def finish(self) -> None:
        """Whatever happened: once the request ends, nothing is held or promised."""
        self.pages.release(self.key)
        self.pages.check()
        assert self.pages.num_held == self.pages.num_promised == 0
        assert self.reader.settled


def test_all_pages_land() -> None:
    case = Case()
    first, second = case.read(0, 2, 8), case.read(2, 1, 10)
    assert first.src_pages == (40, 41)
    assert first.checksums == (7, 7)
    assert [*first.dst_pages, *second.dst_pages] == case.pages.table(case.key)
    case.done(first)
    case.first_token(held_ms=500.0)
    assert case.reader.take_ended() == []
    case.done(second, at=4.0)
    (read,) = case.reader.take_ended()
    assert read.computed == 10
    assert read.first is not None
    assert read.first.token_ids == [42]
    assert read.spans.transfer_bytes == 192
    assert read.spans.exposed_transfer_ms == 1500.0  # from the first token to the last page
    assert isinstance(case.links.sent[0], Prefill)
    assert isinstance(case.links.sent[-1], PagesLanded)
    assert case.pages.match(case.wanted.hashes) == list(first.dst_pages)  # named: the next prompt finds them
    case.finish()


def test_a_mismatch_is_counted_whether_or_not_somebody_still_waits() -> None:
    case = Case()
    read = case.read(0, 2, 8)
    assert case.reader.cancel(case.key)
    case.reader.completed(ReadMismatch(read.tag, [read.dst_pages[1]]), 2.0)
    assert case.reader.counters.checksum_failures == 1 and case.reader.quarantined_pages == 0


def test_a_failed_read_keeps_what_landed() -> None:
    for event in (ReadFailed, ReadMismatch):
        case = Case()
        first, second = case.read(0, 1, 4), case.read(1, 2, 10)
        case.done(first)
        bad = ReadFailed(second.tag, "cut") if event is ReadFailed else ReadMismatch(second.tag, [second.dst_pages[0]])
        case.reader.completed(bad, 2.0)
        (read,) = case.reader.take_ended()
        assert read.computed == 4
        assert read.first is None
        assert read.spans.local_prefill
        assert case.pages.table(case.key) == list(first.dst_pages)
        assert any(isinstance(message, Abort) for message in case.links.sent)
        assert case.reader.counters.checksum_failures == (1 if event is ReadMismatch else 0)
        case.first_token()  # late: changes nothing
        case.finish()


def test_a_stalled_read_keeps_its_pages_in_quarantine_until_it_settles() -> None:
    case = Case()
    job = case.read(0, 2, 8)
    case.reader.completed(ReadStalled(job.tag, 5.0), 6.0)
    (read,) = case.reader.take_ended()
    assert read.computed == 0
    assert case.pages.table(QUARANTINE) == list(job.dst_pages)
    case.pages.release(case.key)
    assert case.pages.num_held == 2
    assert not case.reader.settled
    case.reader.completed(ReadSettled(job.tag), 60.0)
    case.finish()


def test_cancelled_while_reading_the_pages_wait_for_the_read() -> None:
    case = Case()
    job = case.read(0, 2, 8)
    assert case.reader.cancel(case.key)
    assert case.mover.cancelled == [job.tag]
    assert case.pages.num_held == 2
    case.done(job)  # it was too late to cancel
    case.finish()
    assert not case.reader.cancel(case.key)


def test_a_lost_prefill_worker_and_late_tickets() -> None:
    case = Case()
    job = case.read(0, 1, 4)
    case.done(job)
    case.event(PeerLost("p1", "cut"))
    (read,) = case.reader.take_ended()
    assert read.computed == 4
    sent = len(case.links.sent)
    assert case.ticket(1, 1, 8) is None
    assert isinstance(case.links.sent[sent], PagesLanded)  # so that the lender does not keep that loan
    case.finish()


def test_duplicate_and_unexpected_tickets_bind_nothing() -> None:
    case = Case()
    case.read(0, 1, 4)
    assert case.ticket(0, 1, 4) is None
    assert case.ticket(2, 1, 10) is None  # a gap
    assert len(case.pages.table(case.key)) == 1


def test_pages_that_landed_after_the_lease_are_not_trusted() -> None:
    case = Case()
    job = case.read(0, 2, 8)
    case.done(job, at=10.0)  # leased until then
    (read,) = case.reader.take_ended()
    assert read.computed == 0
    case.finish()


def test_pages_without_checksums_are_trusted_when_their_lender_has_answered_after_they_came() -> None:
    case = Case()
    case.links.answered = 0
    first, second = case.ticket(0, 2, 8, checked=False), case.ticket(2, 1, 10, checked=False)
    assert first is not None and second is not None
    case.first_token()
    for job in (first, second):
        case.done(job)
        case.reader.expire(2.0)
    case.links.answered = 1
    case.reader.expire(2.5)
    (row,) = case.reader.rows(2.5)
    assert row["unproven"] == 1 and case.reader.take_ended() == []
    case.links.answered = 2
    case.reader.expire(4.0)
    (read,) = case.reader.take_ended()
    assert read.computed == 10
    assert read.spans.exposed_transfer_ms == 1000.0  # the first token was there at 3.0
    case.finish()


@pytest.mark.parametrize("end", ["it leaves", "its lease ends", "nobody wants it"])
def test_pages_without_checksums_of_a_lender_that_does_not_answer_any_more_are_not_trusted(end: str) -> None:
    case = Case()
    case.links.answered = 0
    job = case.ticket(0, 2, 8, checked=False)
    assert job is not None
    case.done(job, at=2.0)
    if end == "it leaves":
        case.event(PeerLost("p1", "it has left", left=True), 2.0)
    elif end == "its lease ends":
        case.reader.expire(9.9)
        assert case.reader.take_ended() == []
        case.reader.expire(10.0)
    else:
        case.reader.cancel(case.key)
    assert [read.computed for read in case.reader.take_ended()] == ([] if end == "nobody wants it" else [0])
    assert case.reader.quarantined_pages == 0
    case.finish()


def test_refused_and_finished_by_the_first_token() -> None:
    case = Case()
    case.event(PrefillFailed(request_id="r", attempt=0, code="unavailable", message="draining"))
    (read,) = case.reader.take_ended()
    assert read.computed == 0
    case.finish()
    case = Case()
    job = case.read(0, 2, 8)
    done = PrefillDone(request_id="r", attempt=0, token_ids=[1], finish=Finish(reason="stop"))
    case.event(done, 2.0)
    (read,) = case.reader.take_ended()
    assert read.first is done
    assert case.reader.counters.handoff_failures == 0
    case.pages.release(case.key)
    case.reader.completed(ReadFailed(job.tag, "cancelled"), 2.0)
    case.finish()


def test_a_peer_that_cannot_be_read_is_not_asked_again() -> None:
    case = Case()
    case.reader.completed(ConnectFailed("p1", "nixl", "no route"), 1.0)
    assert len(case.reader.take_ended()) == 1
    case.pages.release(case.key)
    asked = len([m for m in case.links.sent if isinstance(m, Prefill)])
    case.ask(2.0)
    assert len(case.reader.take_ended()) == 1
    assert len([m for m in case.links.sent if isinstance(m, Prefill)]) == asked
    case.finish()


def test_another_transport_is_tried_when_one_does_not_open() -> None:
    case = Case()
    case.reader.transports = PeerTransports(["cuda_ipc", "nixl"], "auto")
    pool = IpcPool(host_id().partition("/")[0], "another", "GPU-1", b"", 0, 0, page_bytes=64, num_pages=64)
    offers = {"cuda_ipc": msgspec.msgpack.encode(pool), "nixl": b""}
    worker = msgspec.structs.replace(LENDER, transports=offers)
    case.event(PeerFound(worker))
    assert case.reader.transports.chosen == {"p1": "cuda_ipc"}
    case.reader.completed(ConnectFailed("p1", "cuda_ipc", "no peer access"), 1.0)
    assert case.reader.transports.chosen == {"p1": "nixl"} and not case.reader.transports.unreadable
    assert len(case.reader.take_ended()) == 1  # what was under way is computed here
    case.reader.completed(ConnectFailed("p1", "nixl", "no route"), 2.0)
    assert case.reader.transports.unreadable == {"p1": "cuda_ipc: no peer access; nixl: no route"}
    case.event(PeerLost("p1", "gone"))
    case.event(PeerFound(worker))  # a new link is a new try
    assert case.reader.transports.chosen == {"p1": "cuda_ipc"}
    case.pages.release(case.key)
    case.finish()


def test_without_its_first_token_the_prompts_last_page_is_nobodys_to_find() -> None:
    """All of a prompt of two full pages has landed, and the lender is gone: its last token is computed once more, into
    a page that must not be lent, or taken from the cache, meanwhile. With the first token it is complete."""
    for first_token in (False, True):
        case = Case()
        case.pages.release(case.key)
        case.reader.cancel(case.key)
        case.wanted = replace(case.wanted, num_pages=2, num_tokens=8)
        case.pages.promise(case.key, 2)
        case.reader.hand_off(case.wanted, LENDER, Prefill(request=case.request, router_id="router"), 0.0)
        case.done(case.read(0, 2, 8))
        if first_token:
            case.first_token()
        else:
            case.event(PeerLost("p1", "gone"))
        (read,) = case.reader.take_ended()
        assert read.computed == 8
        assert len(case.pages.match(case.wanted.hashes)) == (2 if first_token else 1)
        case.finish()


def test_pages_that_no_ticket_covered_are_a_failure_that_is_counted() -> None:
    case = Case()
    case.done(case.read(0, 2, 8))
    case.first_token()
    (read,) = case.reader.take_ended()
    assert read.computed == 8 and read.spans.local_prefill
    assert case.reader.counters.handoff_failures == 1
    case.finish()
    case = fetching()
    case.done(case.read(0, 1, 4))
    case.event(FetchDone(request_id="r", attempt=0, num_pages=2))
    (read,) = case.reader.take_ended()
    assert read.computed == 4 and case.reader.counters.fetch_failures == 1
    case.finish()


def fetching(prefill_tokens_per_s: float = 0.0) -> Case:
    """A worker that has asked for the two full pages of the prompt."""
    case = Case()
    case.pages.release(case.key)
    case.reader.cancel(case.key)
    rates = MeasuredRates(prefill_tokens_per_s=prefill_tokens_per_s)
    case.reader.rates.rates = lambda: rates  # type: ignore[method-assign]
    case.wanted = replace(case.wanted, num_pages=2, num_tokens=8)
    case.pages.promise(case.key, 2)
    case.reader.fetch(case.wanted, LENDER, 1.0)
    case.event(PeerFound(LENDER), 1.0)
    return case


def test_a_fetch_is_given_up_when_its_source_says_nothing() -> None:
    case = fetching()
    case.reader.expire(2.9)
    case.done(case.read(0, 1, 4, now=2.9), at=3.5)
    case.reader.expire(5.4)
    assert case.reader.take_ended() == []
    case.reader.expire(5.6)
    (read,) = case.reader.take_ended()
    assert read.computed == 4 and case.reader.counters.fetch_failures == 1
    case.finish()


def test_a_fetch_may_cost_as_much_waiting_as_computing_would() -> None:
    """8 tokens at one a second; with the first page here, 4."""
    case = fetching(prefill_tokens_per_s=1.0)
    case.reader.expire(8.9)
    case.done(case.read(0, 1, 4, now=8.9), at=9.0)
    case.reader.expire(12.9)
    assert case.reader.take_ended() == []
    case.reader.expire(13.1)
    assert len(case.reader.take_ended()) == 1
    case.finish()


def test_what_is_being_read_is_not_given_up_however_slow_the_link() -> None:
    """Both tickets came at once, the first is read for longer than any patience: the mover says when it has stalled."""
    case = fetching()
    first, second = case.read(0, 1, 4), case.read(1, 1, 8)
    case.event(FetchDone(request_id="r", attempt=0, num_pages=2))
    for now in range(1, 60):
        case.reader.expire(float(now))
        case.links.until = now + 10.0
    assert case.reader.take_ended() == []
    assert case.reader.rows(60.0)[0]["reads"] == 2
    case.done(first, at=60.0)
    case.reader.expire(62.5)
    case.done(second, at=65.0)
    (read,) = case.reader.take_ended()
    assert read.computed == 8 and case.reader.counters.fetch_failures == 0
    case.finish()


def test_a_page_that_is_full_in_part_counts_as_the_tokens_that_it_has() -> None:
    case = fetching()
    case.reader.cancel(case.key)
    case.pages.release(case.key)
    case.wanted = replace(case.wanted, num_pages=3, num_tokens=9, hashes=[*case.wanted.hashes, b"the ninth"])
    case.pages.promise(case.key, 3)
    case.reader.fetch(case.wanted, LENDER, 1.0)
    case.done(case.read(0, 3, 12))
    case.event(FetchDone(request_id="r", attempt=0, num_pages=3))
    (read,) = case.reader.take_ended()
    assert read.computed == read.spans.fetched_tokens == case.reader.counters.fetched_tokens == 9
    case.finish()


def test_tickets_of_one_prompt_are_read_in_order() -> None:
    case = Case()
    assert case.read(0, 1, 4).line == case.read(1, 2, 10).line == case.key
    case.reader.cancel(case.key)
    assert case.mover.cancelled == list(case.mover.jobs)
