"""Hand-offs coming in, with a mover and links that only take notes."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from penstock.common.messages import (
    Abort,
    Finish,
    GenerateRequest,
    Message,
    PagesLanded,
    PagesReady,
    Prefill,
    PrefillDone,
    PrefillFailed,
    WorkerInfo,
)
from penstock.common.page_hash import page_hashes, root_hash
from penstock.common.sampling import SamplingParams
from penstock.decode_worker.admission import Entry
from penstock.decode_worker.handoff import QUARANTINE, HandOffIn
from penstock.decode_worker.prefill_links import PrefillLost
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
from penstock.kv_transfer.shm import host_id

LENDER = WorkerInfo(
    worker_id="prefill-0",
    incarnation="p1",
    role="prefill",
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


@dataclass
class NotingMover:
    jobs: dict[str, ReadJob] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)

    def connect(self, peer: str, transport: str, description: bytes) -> None: ...

    def disconnect(self, peer: str) -> None: ...

    def read(self, job: ReadJob) -> None:
        self.jobs[job.tag] = job

    def cancel(self, tag: str) -> None:
        self.cancelled.append(tag)


@dataclass
class NotingLinks:
    sent: list[Message] = field(default_factory=list)
    lent: float = 0.0

    def send(self, worker: WorkerInfo, message: Message, now: float) -> None:
        self.sent.append(message)

    def send_if_linked(self, incarnation: str, message: Message) -> None:
        self.sent.append(message)

    def lent_at(self, incarnation: str, heartbeat_seq: int) -> float:
        return self.lent


class Case:
    """A decode worker that has just asked prefill-0 for a prompt of 10 tokens: pages of 4, 4 and 2."""

    def __init__(self, num_pages: int = 16) -> None:
        self.pages = PageManager(num_pages, 4)
        self.mover = NotingMover()
        self.links = NotingLinks()
        self.handoffs = HandOffIn(
            pages=self.pages,
            mover=self.mover,  # type: ignore[arg-type]
            links=self.links,  # type: ignore[arg-type]
            landings=Landings(10.0),
            own_transports=["nixl"],
            kv_transport="auto",
        )
        tokens = list(range(10))
        request = GenerateRequest(request_id="r", prompt_token_ids=tokens, sampling=SamplingParams())
        self.entry = Entry(b"router/1", request, LENDER, 0.0, list(page_hashes(root_hash("t"), tokens, 4)))
        self.pages.promise(self.entry.key, 3)
        self.handoffs.begin(self.entry, LENDER, "router", 0.0)
        self.handoffs.found(LENDER)

    def ticket(self, first_page: int, count: int, num_tokens: int) -> ReadJob | None:
        before = set(self.mover.jobs)
        src = list(range(40 + first_page, 40 + first_page + count))
        message = PagesReady(
            request_id="r",
            attempt=0,
            first_page=first_page,
            pages=[src],
            checksums=[[7] * count],
            num_tokens=num_tokens,
        )
        self.handoffs.ticket("p1", message, 1.0)
        new = set(self.mover.jobs) - before
        return self.mover.jobs[new.pop()] if new else None

    def read(self, first_page: int, count: int, num_tokens: int) -> ReadJob:
        job = self.ticket(first_page, count, num_tokens)
        assert job is not None
        return job

    def done(self, job: ReadJob, at: float = 2.0) -> None:
        self.handoffs.completed(ReadDone(job.tag, 64 * len(job.dst_pages), 0.1, at), at)

    def first_token(self) -> None:
        self.handoffs.prefill_done(PrefillDone(request_id="r", attempt=0, token_ids=[42]), 3.0)

    def finish(self) -> None:
        """Whatever happened: once the entry ends, nothing is held or promised."""
        self.pages.release(self.entry.key)
        self.pages.check()
        assert self.pages.num_held == self.pages.num_promised == 0
        assert self.handoffs.settled


def test_all_pages_land() -> None:
    case = Case()
    first, second = case.read(0, 2, 8), case.read(2, 1, 10)
    assert first.src_pages == (40, 41)
    assert first.checksums == (7, 7)
    assert [*first.dst_pages, *second.dst_pages] == case.pages.table(case.entry.key)
    case.done(first)
    case.first_token()
    assert case.handoffs.take_ready() == []
    case.done(second, at=4.0)
    (ready,) = case.handoffs.take_ready()
    assert ready.computed == 10
    assert ready.first is not None
    assert ready.first.token_ids == [42]
    assert ready.spans.transfer_bytes == 192
    assert ready.spans.exposed_transfer_ms == 1000.0  # from the first token to the last page
    assert isinstance(case.links.sent[0], Prefill)
    assert isinstance(case.links.sent[-1], PagesLanded)
    assert case.pages.match(case.entry.hashes) == list(first.dst_pages)  # named: the next prompt finds them
    case.finish()


def test_a_failed_read_keeps_what_landed() -> None:
    for event in (ReadFailed, ReadMismatch):
        case = Case()
        first, second = case.read(0, 1, 4), case.read(1, 2, 10)
        case.done(first)
        bad = ReadFailed(second.tag, "cut") if event is ReadFailed else ReadMismatch(second.tag, [second.dst_pages[0]])
        case.handoffs.completed(bad, 2.0)
        (ready,) = case.handoffs.take_ready()
        assert ready.computed == 4
        assert ready.first is None
        assert ready.spans.local_prefill
        assert case.pages.table(case.entry.key) == list(first.dst_pages)
        assert any(isinstance(message, Abort) for message in case.links.sent)
        assert case.handoffs.counters.checksum_failures == (1 if event is ReadMismatch else 0)
        case.first_token()  # late: changes nothing
        case.finish()


def test_a_stalled_read_keeps_its_pages_in_quarantine_until_it_settles() -> None:
    case = Case()
    job = case.read(0, 2, 8)
    case.handoffs.completed(ReadStalled(job.tag, 5.0), 6.0)
    (ready,) = case.handoffs.take_ready()
    assert ready.computed == 0
    assert case.pages.table(QUARANTINE) == list(job.dst_pages)
    case.pages.release(case.entry.key)
    assert case.pages.num_held == 2
    assert not case.handoffs.settled
    case.handoffs.completed(ReadSettled(job.tag), 60.0)
    case.finish()


def test_cancelled_while_reading_the_pages_wait_for_the_read() -> None:
    case = Case()
    job = case.read(0, 2, 8)
    assert case.handoffs.cancel(case.entry.key) is case.entry
    assert case.mover.cancelled == [job.tag]
    assert case.pages.num_held == 2
    case.done(job)  # it was too late to cancel
    case.finish()
    assert case.handoffs.cancel(case.entry.key) is None


def test_a_lost_prefill_worker_and_late_tickets() -> None:
    case = Case()
    job = case.read(0, 1, 4)
    case.done(job)
    case.handoffs.lost(PrefillLost("p1", "cut"))
    (ready,) = case.handoffs.take_ready()
    assert ready.computed == 4
    sent = len(case.links.sent)
    assert case.ticket(1, 1, 8) is None
    assert isinstance(case.links.sent[sent], PagesLanded)  # so that the lender does not keep that loan
    case.finish()


def test_duplicate_and_unexpected_tickets_bind_nothing() -> None:
    case = Case()
    case.read(0, 1, 4)
    assert case.ticket(0, 1, 4) is None
    assert case.ticket(2, 1, 10) is None  # a gap
    assert len(case.pages.table(case.entry.key)) == 1


def test_pages_that_landed_after_the_lease_are_not_trusted() -> None:
    case = Case()
    job = case.read(0, 2, 8)
    case.done(job, at=10.0)  # lent at 0, lease 10
    (ready,) = case.handoffs.take_ready()
    assert ready.computed == 0
    case.finish()


def test_refused_and_finished_by_the_first_token() -> None:
    case = Case()
    case.handoffs.prefill_failed(PrefillFailed(request_id="r", attempt=0, code="unavailable", message="draining"))
    (ready,) = case.handoffs.take_ready()
    assert ready.computed == 0
    case.finish()
    case = Case()
    job = case.read(0, 2, 8)
    done = PrefillDone(request_id="r", attempt=0, token_ids=[1], finish=Finish(reason="stop"))
    case.handoffs.prefill_done(done, 2.0)
    (ready,) = case.handoffs.take_ready()
    assert ready.first is done
    assert case.handoffs.counters.handoff_failures == 0
    case.pages.release(case.entry.key)
    case.handoffs.completed(ReadFailed(job.tag, "cancelled"), 2.0)
    case.finish()


def test_a_peer_that_cannot_be_read_is_not_asked_again() -> None:
    case = Case()
    case.handoffs.completed(ConnectFailed("p1", "nixl", "no route"), 1.0)
    assert len(case.handoffs.take_ready()) == 1
    case.pages.release(case.entry.key)
    case.pages.promise(case.entry.key, 3)
    asked = len([m for m in case.links.sent if isinstance(m, Prefill)])
    case.handoffs.begin(case.entry, LENDER, "router", 2.0)
    assert len(case.handoffs.take_ready()) == 1
    assert len([m for m in case.links.sent if isinstance(m, Prefill)]) == asked
    case.finish()


def test_another_transport_is_tried_when_one_does_not_open() -> None:
    case = Case()
    case.handoffs.own_transports = ["cuda_ipc", "nixl"]
    pool = IpcPool(host_id().partition("/")[0], "another", "GPU-1", b"", 0, 0, page_bytes=64, num_pages=64)
    offers = {"cuda_ipc": msgspec.msgpack.encode(pool), "nixl": b""}
    worker = msgspec.structs.replace(LENDER, transports=offers)
    case.handoffs.found(worker)
    assert case.handoffs._peers == {"p1": "cuda_ipc"}
    case.handoffs.completed(ConnectFailed("p1", "cuda_ipc", "no peer access"), 1.0)
    assert case.handoffs._peers == {"p1": "nixl"} and not case.handoffs._unreadable
    assert len(case.handoffs.take_ready()) == 1  # what was under way is computed here
    case.handoffs.completed(ConnectFailed("p1", "nixl", "no route"), 2.0)
    assert case.handoffs._unreadable == {"p1": "cuda_ipc: no peer access; nixl: no route"}
    case.handoffs.lost(PrefillLost("p1", "gone"))
    case.handoffs.found(worker)  # a new link is a new try
    assert case.handoffs._peers == {"p1": "cuda_ipc"}
    case.pages.release(case.entry.key)
    case.finish()
