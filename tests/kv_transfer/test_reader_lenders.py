"""Whose word counts for what is read: events of other lenders, of a prefix's end, of reads that were given up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.common.messages import Fetch, FetchDone, PagesLanded, PagesReady, PrefillDone, PrefillFailed
from penstock.kv_transfer.jobs import ReadFailed, ReadSettled, ReadStalled
from penstock.kv_transfer.peer_links import LinkEvent, PeerFound, PeerLost
from penstock.kv_transfer.reader import QUARANTINE
from tests.kv_transfer.noting import nixl_worker
from tests.kv_transfer.test_reader import Case

OTHER = nixl_worker("decode-1", "d1")


def ticket(first_page: int, pages: list[int], num_tokens: int, attempt: int = 0) -> PagesReady:
    checksums = [[7] * len(pages)]
    return PagesReady(
        request_id="r",
        attempt=attempt,
        first_page=first_page,
        pages=[pages],
        checksums=checksums,
        num_tokens=num_tokens,
    )


@pytest.mark.parametrize(
    "event",
    [
        ticket(0, [1, 2, 3], 10),
        PrefillDone(request_id="r", attempt=0, token_ids=[9]),
        PrefillFailed(request_id="r", attempt=0, code="unavailable", message="not asked"),
        FetchDone(request_id="r", attempt=0, num_pages=0),
    ],
    ids=lambda event: type(event).__name__,
)
def test_who_was_not_asked_changes_nothing(event: LinkEvent) -> None:
    case = Case()
    case.reader.link_event("d1", PeerFound(OTHER), 1.0)
    case.reader.link_event("d1", event, 1.0)
    assert case.mover.jobs == {} and case.reader.take_ended() == []
    if isinstance(event, PagesReady):
        assert isinstance(case.links.sent[-1], PagesLanded), "it need not keep them for us"
    case.done(case.read(0, 3, 10))
    case.first_token()
    (read,) = case.reader.take_ended()
    assert read.computed == 10 and read.first is not None and read.first.token_ids == [42]
    case.finish()


def test_a_lender_that_is_lost_takes_only_its_own_reads_along() -> None:
    case = Case()
    wanted = replace(case.wanted, key="r:0:1", attempt=1)
    case.pages.promise(wanted.key, 3)
    case.reader.fetch(wanted, OTHER, 1.0)
    case.reader.link_event("d1", PeerFound(OTHER), 1.0)
    case.event(PeerLost("p1", "killed"))
    assert [read.key for read in case.reader.take_ended()] == [case.key]
    assert case.reader.reads_for("r"), "the other attempt"
    case.reader.link_event("d1", ticket(0, [1, 2, 3], 12, attempt=1), 2.0)
    (job,) = case.mover.jobs.values()
    case.done(job)
    case.reader.link_event("d1", FetchDone(request_id="r", attempt=1, num_pages=3), 3.0)
    (read,) = case.reader.take_ended()
    assert (read.key, read.computed) == (wanted.key, 10) and not case.reader.reads_for("r")
    case.pages.release(wanted.key)
    case.finish()


def test_a_fetch_asks_for_what_is_behind_the_pages_that_are_here_and_ends_there() -> None:
    case = Case()
    assert case.reader.cancel(case.key)
    case.pages.release(case.key)
    wanted = replace(case.wanted, key="r:0:1", attempt=1, first_page=1, num_pages=2, hashes=[b"0", b"1", b"2"])
    case.pages.allocate(wanted.key, 1)
    case.pages.promise(wanted.key, 2)
    case.reader.fetch(wanted, OTHER, 1.0)
    asked = case.links.sent[-1]
    assert isinstance(asked, Fetch) and asked.first_page == 1 and asked.hashes == [b"1", b"2"]
    case.reader.link_event("d1", PeerFound(OTHER), 1.0)
    case.reader.link_event("d1", ticket(1, [5], 8, attempt=1), 2.0)
    (job,) = case.mover.jobs.values()
    case.done(job)
    case.reader.link_event("d1", FetchDone(request_id="r", attempt=1, num_pages=1), 3.0)
    (read,) = case.reader.take_ended()
    assert case.pages.drain_events() == ([(b"1", b"0")], []), "behind the page that was here"
    assert read.computed == 8 and case.reader.counters.fetch_failures == 0, "it has no more, and has lent all of that"
    case.pages.release(wanted.key)
    case.finish()


def test_a_read_of_a_cancelled_request_that_stalls_keeps_its_pages_until_it_settles() -> None:
    case = Case()
    job = case.read(0, 2, 8)
    assert case.reader.cancel(case.key)
    case.pages.release(case.key)
    case.reader.completed(ReadStalled(job.tag, 5.0), 2.0)
    assert case.pages.table(QUARANTINE) == list(job.dst_pages), "it may still write them"
    case.reader.completed(ReadSettled(job.tag), 9.0)
    case.finish()


def test_room_for_what_did_not_come_stays_promised() -> None:
    """The engine computes it, and needs as many pages."""
    case = Case()
    job = case.read(0, 2, 8)
    case.reader.completed(ReadFailed(job.tag, "no route"), 2.0)
    (read,) = case.reader.take_ended()
    assert read.computed == 0 and case.pages.num_held == 0 and case.pages.num_promised == 3
    case.finish()
