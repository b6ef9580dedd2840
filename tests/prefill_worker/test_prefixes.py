"""Prefixes of others: fetched before a prompt is computed, and lent to who asks for them."""

from __future__ import annotations

import pytest

from penstock.common.messages import (
    Abort,
    Fetch,
    FetchDone,
    GenerateRequest,
    PagesLanded,
    PagesReady,
    PrefillFailed,
    TokenBatch,
)
from penstock.common.sampling import SamplingParams
from penstock.engine.pages import NoRoom
from penstock.engine.request import Request
from penstock.kv_transfer.peer_links import PeerFound, PeerLost
from penstock.kv_transfer.reading import PATIENCE_S
from tests.engine.test_scheduler import oracle
from tests.kv_transfer.noting import nixl_worker
from tests.prefill_worker.cases import DECODE, PROMPT, Case

SOURCE = nixl_worker("decode-1", "d1")


def _fetching(case: Case) -> Fetch:
    """A prompt of 10 tokens begins with asking for its two full pages."""
    case.prefill(source=SOURCE)
    (asked,) = case.links.sent
    assert isinstance(asked, Fetch) and (asked.first_page, len(asked.hashes)) == (0, 2)
    assert not case.engine.has_work()
    case.links.events.append(("d1", PeerFound(SOURCE)))
    return asked


def test_a_prefix_is_fetched_lent_on_and_only_the_rest_computed() -> None:
    case = Case(checksum="off")
    asked = _fetching(case)
    ticket = PagesReady(request_id="r", attempt=0, first_page=0, pages=[[40, 41]], num_tokens=8)
    case.links.events += [("d1", ticket), ("d1", FetchDone(request_id="r", attempt=0, num_pages=2))]
    case.step()
    (job,) = case.arrive()
    assert job.src_pages == (40, 41)
    case.step()
    assert isinstance(case.links.sent[-1], PagesLanded)
    assert [(t.first_page, t.pages) for t in case.of(PagesReady)[:1]] == [(0, [list(job.dst_pages)])]
    assert case.engine.steps == 1  # of three that the whole prompt takes
    (batch,) = case.of(TokenBatch)
    assert batch.deltas[0].spans.fetched_tokens == 8 and batch.deltas[0].spans.computed_tokens == 2
    assert batch.deltas[0].spans.cached_tokens == 0 and batch.deltas[0].spans.source == "decode-1"
    assert [t.first_page for t in case.of(PagesReady)] == [0, 2]
    assert case.engine.pages.match(asked.hashes) == list(job.dst_pages)  # the next prompt finds them
    assert case.role.load()["fetched_tokens"] == 8
    case.land()
    case.finish()


def test_choices_that_have_gone_apart_fetch_each_their_own_pages() -> None:
    """They come from a worker that drains, which keeps the pages of each until they are asked for."""
    case = Case(checksum="off")
    _fetching(case)
    case.prefill(choice=1, source=SOURCE, output=(1, 2))
    case.step()
    assert [one.choice for one in case.links.sent if isinstance(one, Fetch)] == [0, 1]
    for choice in (0, 1):
        case.role.handle(DECODE, Abort(request_id="r", attempt=0, choice=choice), case.now)
    case.step()
    case.finish()


@pytest.mark.parametrize("end", ["it comes", "its source is lost", "who fetches is aborted", "all are aborted"])
def test_choices_that_come_together_have_their_prefix_fetched_once(end: str) -> None:
    case = Case(checksum="off")
    _fetching(case)
    for choice in (1, 2):
        case.prefill(max_tokens=1, choice=choice, source=SOURCE)
    case.step()
    assert len(case.links.sent) == 1 and case.role.load()["deferred"] == 3 and not case.engine.has_work()
    aborted = {"who fetches is aborted": [0], "all are aborted": [2, 0, 1]}.get(end, [])
    if end == "it comes":
        ticket = PagesReady(request_id="r", attempt=0, first_page=0, pages=[[40, 41]], num_tokens=8)
        case.links.events += [("d1", ticket), ("d1", FetchDone(request_id="r", attempt=0, num_pages=2))]
        case.step()
        case.arrive()
    elif not aborted:
        case.links.events.append(("d1", PeerLost("d1", "cut")))
    for choice in aborted:
        case.role.handle(DECODE, Abort(request_id="r", attempt=0, choice=choice), case.now)
    for _ in range(6):
        case.step()
    tokens = {d.choice: d.token_ids for batch in case.of(TokenBatch) for d in batch.deltas}
    assert tokens == {choice: oracle(PROMPT, 1) for choice in range(3) if choice not in aborted}
    computed = case.engine.scheduler.counters.prompt_tokens
    assert computed == {"it comes": 3 * 2, "its source is lost": 10 + 2 * 2, "who fetches is aborted": 10 + 2}.get(
        end, 0
    )
    assert case.role.load()["fetches"] == 1
    for choice in range(3):
        case.land(choice=choice)
    case.finish()


def test_a_prefix_may_take_longer_to_come_than_a_prompt_may_wait_for_room() -> None:
    case = Case(checksum="off")
    _fetching(case)
    ticket = PagesReady(request_id="r", attempt=0, first_page=0, pages=[[40, 41]], num_tokens=8)
    case.links.events += [("d1", ticket), ("d1", FetchDone(request_id="r", attempt=0, num_pages=2))]
    case.step()
    case.now = 100.0
    case.engine.pages.allocate("somebody", case.engine.pages.num_available)  # it is not planned in this turn
    case.arrive()
    case.role.tick(case.now)
    case.role.tick(case.now)
    assert not case.of(PrefillFailed)
    case.engine.pages.release("somebody")
    case.step()
    assert [delta.spans.fetched_tokens for batch in case.of(TokenBatch) for delta in batch.deltas] == [8]
    case.land()
    case.finish()


def test_what_a_source_no_longer_holds_is_computed() -> None:
    for num_pages in (0, 1):
        case = Case(checksum="off")
        _fetching(case)
        if num_pages:
            ticket = PagesReady(request_id="r", attempt=0, first_page=0, pages=[[40]], num_tokens=4)
            case.links.events.append(("d1", ticket))
        case.links.events.append(("d1", FetchDone(request_id="r", attempt=0, num_pages=num_pages)))
        case.step()
        assert len(case.arrive()) == num_pages
        for _ in range(3):
            case.step()
        assert case.engine.steps == 3 - num_pages
        assert case.of(TokenBatch)[0].deltas[0].spans.computed_tokens == 10 - 4 * num_pages
        assert case.role.load()["fetch_failures"] == 0
        case.land()
        case.finish()


def test_a_source_that_is_lost_or_slow_is_not_waited_for() -> None:
    for end in ("lost", "slow"):
        case = Case(checksum="off")
        _fetching(case)
        case.step()
        if end == "lost":
            case.links.events.append(("d1", PeerLost("d1", "cut")))
        else:
            case.now = PATIENCE_S + 0.1
        for _ in range(4):
            case.step()
        assert case.engine.steps == 3
        assert case.role.load()["fetch_failures"] == 1
        case.land()
        case.finish()


def test_a_fetching_prompt_that_is_aborted_leaves_nothing() -> None:
    case = Case()
    _fetching(case)
    case.step()
    case.role.handle(DECODE, Abort(request_id="r", attempt=0), case.now)
    assert isinstance(case.links.sent[-1], PagesLanded)
    case.finish()


def test_no_fetch_without_room_nor_of_what_is_here() -> None:
    case = Case(checksum="off")
    case.engine.pages.allocate("somebody", 15)
    case.prefill(source=SOURCE)
    assert case.links.sent == []
    case.engine.pages.release("somebody")
    for _ in range(3):
        case.step()
    case.land()
    case.prefill(name="again", source=SOURCE)  # its full pages are in the cache
    assert case.links.sent == []
    case.step()
    case.land("again")
    case.finish()


def test_cached_pages_are_lent_to_who_fetches_them() -> None:
    for lend_to in ("reader", "gone"):
        case = Case()
        case.prefill()
        for _ in range(3):
            case.step()
        case.seal_all()
        case.land()
        shape = Request(GenerateRequest(request_id="q", prompt_token_ids=PROMPT, sampling=SamplingParams()), 0.0)
        hashes = shape.extend_hashes(case.engine.scheduler.hash_scope, 4, 10)
        case.sent.clear()
        other = b"decode/2"
        case.role.handle(other, Fetch(request_id="q", attempt=0, first_page=0, hashes=[*hashes, b"unknown"]), 0.0)
        assert case.role.load()["lent_pages"] == 2  # while they are sealed, too
        case.seal_all()
        (row,) = case.role.ledger()["loans"]
        assert (row["peer"], row["key"], row["pages"]) == ("decode/2", "q:0:0", case.engine.pages.match(hashes))
        ticket, done = (message for _, message in case.sent)
        assert (ticket.first_page, ticket.pages, ticket.num_tokens) == (0, [case.engine.pages.match(hashes)], 8)
        assert ticket.checksums == [[7, 7]] and done.num_pages == 2
        with pytest.raises(NoRoom):  # they are not evicted while they are lent
            case.engine.pages.allocate("somebody", 15)
        if lend_to == "reader":
            case.role.handle(other, PagesLanded(request_id="q", attempt=0), 1.0)
        else:
            case.role.peer_gone(other)
        case.finish()


def test_pages_that_were_promised_are_not_lent() -> None:
    """Who waits for tickets of its own takes the pages that it was promised, whatever is asked for meanwhile."""
    case = Case()
    pages = case.engine.pages
    case.prefill()
    for _ in range(3):
        case.step()
    case.seal_all()
    case.land()
    hashes = Request(GenerateRequest(request_id="q", prompt_token_ids=PROMPT, sampling=SamplingParams()), 0.0)
    asked = Fetch(
        request_id="q",
        attempt=0,
        first_page=0,
        hashes=list(hashes.extend_hashes(case.engine.scheduler.hash_scope, 4, 10)),
    )
    pages.promise("waits", pages.num_available - 1)
    case.role.handle(b"decode/2", asked, 0.0)
    pages.check()
    case.seal_all()
    (ticket,) = [m for m in case.of(PagesReady) if m.request_id == "q"]
    (done,) = case.of(FetchDone)
    assert len(ticket.pages[0]) == done.num_pages == 1
    assert len(pages.allocate("waits", pages.num_promised)) == 15
    pages.release("waits")
    case.role.handle(b"decode/2", PagesLanded(request_id="q", attempt=0), 1.0)
    case.finish()
