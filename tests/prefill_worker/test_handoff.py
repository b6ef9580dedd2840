"""The lender's side of a hand-off: a real scheduler with an executor that counts, a mover and a bus that take notes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.common.messages import (
    Abort,
    Fetch,
    FetchDone,
    GenerateRequest,
    Message,
    PagesLanded,
    PagesReady,
    Prefill,
    PrefillDone,
    PrefillFailed,
    TokenBatch,
    WorkerInfo,
)
from penstock.common.sampling import SamplingParams
from penstock.engine.core import Engine
from penstock.engine.pages import NoRoom
from penstock.engine.plan import StepPlan, StepResult
from penstock.engine.policy import PrefillPolicy
from penstock.engine.replies import Replies
from penstock.engine.request import Request
from penstock.kv_transfer.exchange import PageExchange
from penstock.kv_transfer.leases import Landings, LoanBook
from penstock.kv_transfer.lender import Lender
from penstock.kv_transfer.mover import Completion, ReadDone, ReadJob, Sealed, SealJob
from penstock.kv_transfer.peer_links import LinkEvent, PeerFound, PeerLost
from penstock.kv_transfer.peer_transports import PeerTransports
from penstock.kv_transfer.reader import FETCH_PATIENCE_S, Reader
from penstock.prefill_worker.handoff import HandOffOut
from tests.engine.test_scheduler import FakeExecutor, make_scheduler, oracle

DECODE, ROUTER = b"decode/1", b"router/1"
PROMPT = [1] * 10  # pages of 4, 4 and 2


class Submitting:
    """`FakeExecutor` behind the executor's interface."""

    def __init__(self, num_pages: int, run_ahead: int) -> None:
        self.run_ahead = run_ahead
        self.fake = FakeExecutor(num_pages)

    def submit(self, plan: StepPlan) -> Any:
        result: StepResult = self.fake.run(plan)
        return SimpleNamespace(result=lambda: result)

    def close(self) -> None: ...


@dataclass
class NotingMover:
    seals: list[SealJob] = field(default_factory=list)
    done: list[Completion] = field(default_factory=list)
    reads: list[ReadJob] = field(default_factory=list)

    def connect(self, peer: str, transport: str, description: bytes) -> None: ...

    def read(self, job: ReadJob) -> None:
        self.reads.append(job)

    def disconnect(self, peer: str) -> None: ...

    def cancel(self, tag: str) -> None: ...

    def seal(self, job: SealJob) -> None:
        self.seals.append(job)

    def expect_readers(self) -> None: ...

    def poll_done(self) -> list[Completion]:
        done, self.done = self.done, []
        return done


@dataclass
class NotingLinks:
    sent: list[Message] = field(default_factory=list)
    events: list[tuple[str, LinkEvent]] = field(default_factory=list)

    def __len__(self) -> int:
        return 0

    def send(self, worker: WorkerInfo, message: Message, now: float) -> None:
        self.sent.append(message)

    def send_if_linked(self, incarnation: str, message: Message) -> None:
        self.sent.append(message)

    def lent_at(self, incarnation: str, heartbeat_seq: int) -> float:
        return 0.0

    def poll(self, now: float) -> list[tuple[str, LinkEvent]]:
        events, self.events = self.events, []
        return events


class Case:
    """A prefill worker with a budget of 4 tokens a step: one page a step."""

    def __init__(self, checksum: str = "all", router: bytes | None = ROUTER, run_ahead: int = 0) -> None:
        self.sent: list[tuple[bytes, Message]] = []
        self.now = 0.0
        scheduler = make_scheduler(16, 4, policy=PrefillPolicy())
        self.executor = Submitting(16, run_ahead)
        self.engine = Engine(scheduler, self.executor, lambda: self.now)
        peers = SimpleNamespace(draining=False, identity_of=lambda name: router, heartbeat_seq=lambda identity: 3)
        bus = SimpleNamespace(send=lambda identity, message: self.sent.append((identity, message)))
        info = SimpleNamespace(worker_id="prefill-0")
        self.loop: Any = SimpleNamespace(info=info, engine=self.engine, peers=peers, bus=bus, replies=Replies(bus.send))
        self.mover = NotingMover()
        self.links = NotingLinks()
        mover: Any = self.mover
        links: Any = self.links
        pages = self.engine.pages
        lender = Lender(
            pages, mover, LoanBook(10.0), bus.send, peers.heartbeat_seq, page_bytes=16 << 20, checksum=checksum
        )
        reader = Reader(pages, mover, links, Landings(10.0), PeerTransports(["nixl"], "auto"))
        self.role = HandOffOut(self.loop, PageExchange(lender, reader, mover, links), lambda: self.now)

    def prefill(self, held_tokens: int = 0, name: str = "r", source: WorkerInfo | None = None, **sampling: Any) -> None:
        params = SamplingParams(**{"max_tokens": 5, **sampling})
        request = GenerateRequest(request_id=name, prompt_token_ids=PROMPT, sampling=params)
        message = Prefill(request=request, router_id="router", held_tokens=held_tokens, source=source)
        self.role.handle(DECODE, message, self.now)

    def step(self) -> None:
        self.role.tick(self.now)
        if self.engine.has_work():
            self.role.stepped(self.engine.step(), self.now)
        self.loop.replies.flush()

    def seal_all(self) -> None:
        self.mover.done += [Sealed(job.tag, [7] * len(job.pages)) for job in self.mover.seals]
        self.mover.seals.clear()
        self.role.tick(self.now)

    def arrive(self) -> list[ReadJob]:
        """What was to be read has landed: pages from the prompt's first one on."""
        jobs = list(self.mover.reads)
        slots = self.executor.fake.slots
        slots |= {
            (page, slot): (4 * index + slot, PROMPT[slot])
            for job in jobs
            for index, page in enumerate(job.dst_pages)
            for slot in range(4)
        }
        self.mover.done += [ReadDone(job.tag, 64 * len(job.dst_pages), 0.1, 0.5) for job in jobs]
        return jobs

    def of(self, kind: type) -> list[Any]:
        return [message for _, message in self.sent if isinstance(message, kind)]

    def land(self, name: str = "r") -> None:
        self.role.handle(DECODE, PagesLanded(request_id=name, attempt=0), self.now)

    def finish(self) -> None:
        self.engine.pages.check()
        assert self.engine.pages.num_held == 0
        assert not self.role.busy()
        assert not any(held for name, held in self.role.ledger().items() if name != "transports")


def test_a_ticket_for_each_chunk_the_token_to_the_router_and_the_end_behind_the_last_ticket() -> None:
    case = Case()
    case.prefill()
    for _ in range(3):
        case.step()
    assert case.of(PagesReady) == []  # nothing is lent before it is sealed
    (batch,) = case.of(TokenBatch)
    assert batch.deltas[0].token_ids == oracle(PROMPT, 1)
    assert batch.deltas[0].finish is None
    assert case.of(PrefillDone) == []
    case.seal_all()
    tickets = case.of(PagesReady)
    assert [(t.first_page, len(t.pages[0]), t.num_tokens) for t in tickets] == [(0, 1, 4), (1, 1, 8), (2, 1, 10)]
    assert all(t.checksums == [[7]] and t.heartbeat_seq == 3 for t in tickets)
    assert case.sent[-1][1] is case.of(PrefillDone)[0]
    assert case.of(PrefillDone)[0].token_ids == oracle(PROMPT, 1)
    assert case.role.load()["lent_pages"] == 3
    case.land()
    case.finish()


def test_pages_the_reader_holds_are_not_offered() -> None:
    case = Case(checksum="off")
    case.prefill(held_tokens=8)
    for _ in range(3):
        case.step()
    assert [(t.first_page, t.checksums) for t in case.of(PagesReady)] == [(2, [])]
    case.land()
    case.finish()


def test_without_a_link_to_the_router_the_decode_worker_delivers() -> None:
    case = Case(checksum="off", router=None)
    case.prefill()
    for _ in range(3):
        case.step()
    (done,) = case.of(PrefillDone)
    assert done.undelivered.token_ids == oracle(PROMPT, 1)
    case.land()
    case.finish()


def test_a_first_token_that_ends_the_request_says_so() -> None:
    case = Case(checksum="off")
    case.prefill(max_tokens=1)
    for _ in range(3):
        case.step()
    assert case.of(TokenBatch)[0].deltas[0].finish.reason == "length"
    done = case.of(PrefillDone)[0]
    assert done.finish.reason == "length"
    assert done.undelivered == case.of(TokenBatch)[0].deltas[0]  # said twice: nobody would miss it if it were lost
    assert len(case.of(PagesReady)) == 2  # of the first two chunks; the last page is not needed
    case.land()
    case.finish()


def test_a_chunk_is_lent_while_the_next_one_computes() -> None:
    case = Case(checksum="off", run_ahead=1)
    case.prefill()
    lent = []
    for _ in range(4):
        case.step()
        lent.append([ticket.num_tokens for ticket in case.of(PagesReady)])
    assert lent == [[], [4], [4, 8], [4, 8, 10]]  # each with the result of its step, a step later
    assert case.engine.steps == 3
    assert case.of(PrefillDone)[0].token_ids == oracle(PROMPT, 1)
    case.land()
    case.finish()


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_aborted_at_any_moment_nothing_stays(run_ahead: int) -> None:
    for steps in range(5):
        for seal in (False, True):
            case = Case(run_ahead=run_ahead)
            case.prefill()
            for _ in range(steps):
                case.step()
            if seal:
                case.seal_all()
            case.role.handle(DECODE, Abort(request_id="r", attempt=0), case.now)
            case.seal_all()  # late seals of what was dropped
            while case.engine.has_work():  # pages that a submitted step writes go with its result
                assert case.engine.pages.num_held > 0
                case.step()
            case.finish()


def test_a_peer_that_is_gone_or_silent_loses_everything() -> None:
    for end in ("gone", "silent"):
        case = Case()
        case.prefill()
        case.prefill(name="other")
        for _ in range(3):
            case.step()
        case.seal_all()
        assert case.role.busy()
        if end == "gone":
            case.role.peer_gone(DECODE)
        else:
            case.now = 10.1
            case.role.tick(case.now)
            while case.engine.has_work():
                case.step()
                case.seal_all()
        case.finish()


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_peer_found_silent_with_its_last_chunk(run_ahead: int) -> None:
    case = Case(checksum="off", run_ahead=run_ahead)
    case.prefill()
    for _ in range(2 + run_ahead):
        case.step()
    assert len(case.of(PagesReady)) == 2
    case.now = 10.1
    case.step()  # the loans end, then the last chunk's ticket is refused
    assert len(case.of(PagesReady)) == 2
    assert case.of(PrefillDone) == []
    case.finish()


def test_heartbeats_keep_loans() -> None:
    case = Case(checksum="off")
    case.prefill()
    for _ in range(3):
        case.step()
    for _ in range(5):
        case.now += 8.0
        case.role.peer_renewed(DECODE, case.now)
        case.role.tick(case.now)
    assert case.role.load()["lent_pages"] == 3
    case.land()
    case.finish()


def test_refusals_have_a_reason() -> None:
    case = Case()
    case.loop.peers.draining = True
    case.prefill()
    assert case.of(PrefillFailed)[0].code == "unavailable"
    case.loop.peers.draining = False
    case.engine.scheduler.max_model_len = 10
    case.prefill()
    assert case.of(PrefillFailed)[1].code == "invalid_request"
    case.finish()


def test_waiting_too_long_fails() -> None:
    case = Case()
    case.engine.pages.allocate("somebody", 16)
    case.prefill()
    case.step()
    case.now = 60.1
    case.role.tick(case.now)
    assert case.of(PrefillFailed)[0].code == "queue_timeout"
    case.engine.pages.release("somebody")
    case.finish()


# ---------------------------------------------------------------- prefixes of others


SOURCE = WorkerInfo(
    worker_id="decode-1",
    incarnation="d1",
    role="decode",
    address="tcp://127.0.0.1:1",
    fingerprint="f",
    model="m",
    served_models=["m"],
    page_size=4,
    num_pages=64,
    page_bytes=64,
    max_model_len=256,
    max_num_seqs=8,
    vocab_size=100,
    transports={"nixl": b""},
)


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
            case.now = FETCH_PATIENCE_S + 0.1
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
    for lend_to in ("reader", "silent", "gone"):
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
        elif lend_to == "gone":
            case.role.peer_gone(other)
        else:
            case.now = 10.1
            case.role.tick(case.now)
        case.finish()


def test_a_short_ticket_that_is_sealed_before_a_long_one_goes_out_behind_it_with_its_own_checksums() -> None:
    case = Case()
    case.prefill()
    for _ in range(3):
        case.step()
    case.mover.done += [Sealed(job.tag, [job.pages[0] + 100]) for job in reversed(case.mover.seals)]
    case.mover.seals.clear()
    case.role.tick(case.now)
    tickets = case.of(PagesReady)
    assert [(t.first_page, t.num_tokens) for t in tickets] == [(0, 4), (1, 8), (2, 10)]
    assert [t.checksums for t in tickets] == [[[t.pages[0][0] + 100]] for t in tickets]
    assert case.sent[-1][1] is case.of(PrefillDone)[0]
    case.land()
    case.finish()
