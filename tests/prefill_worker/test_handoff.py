"""The lender's side of a hand-off: a real scheduler with an executor that counts, a mover and a bus that take notes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.common.messages import (
    Abort,
    GenerateRequest,
    Message,
    PagesLanded,
    PagesReady,
    Prefill,
    PrefillDone,
    PrefillFailed,
    TokenBatch,
)
from penstock.common.sampling import SamplingParams
from penstock.engine.core import Engine
from penstock.engine.plan import StepPlan, StepResult
from penstock.engine.policy import PrefillPolicy
from penstock.engine.replies import Replies
from penstock.kv_transfer.leases import LoanBook
from penstock.kv_transfer.mover import Sealed, SealJob
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
    done: list[Sealed] = field(default_factory=list)

    def seal(self, job: SealJob) -> None:
        self.seals.append(job)

    def expect_readers(self) -> None: ...

    def poll_done(self) -> list[Sealed]:
        done, self.done = self.done, []
        return done


class Case:
    """A prefill worker with a budget of 4 tokens a step: one page a step."""

    def __init__(self, checksum: str = "all", router: bytes | None = ROUTER, run_ahead: int = 0) -> None:
        self.sent: list[tuple[bytes, Message]] = []
        self.now = 0.0
        scheduler = make_scheduler(16, 4, policy=PrefillPolicy())
        self.engine = Engine(scheduler, Submitting(16, run_ahead), lambda: self.now)
        peers = SimpleNamespace(draining=False, identity_of=lambda name: router, heartbeat_seq=lambda identity: 3)
        bus = SimpleNamespace(send=lambda identity, message: self.sent.append((identity, message)))
        info = SimpleNamespace(worker_id="prefill-0")
        self.loop: Any = SimpleNamespace(info=info, engine=self.engine, peers=peers, bus=bus, replies=Replies(bus.send))
        self.mover = NotingMover()
        self.role = HandOffOut(self.loop, self.mover, LoanBook(10.0), checksum, lambda: self.now)  # type: ignore[arg-type]

    def prefill(self, held_tokens: int = 0, name: str = "r", **sampling: Any) -> None:
        params = SamplingParams(**{"max_tokens": 5, **sampling})
        request = GenerateRequest(request_id=name, prompt_token_ids=PROMPT, sampling=params)
        self.role.handle(DECODE, Prefill(request=request, router_id="router", held_tokens=held_tokens), self.now)

    def step(self) -> None:
        self.role.tick(self.now)
        if self.engine.has_work():
            self.role.stepped(self.engine.step(), self.now)
        self.loop.replies.flush()

    def seal_all(self) -> None:
        self.mover.done += [Sealed(job.tag, [7] * len(job.pages)) for job in self.mover.seals]
        self.mover.seals.clear()
        self.role.tick(self.now)

    def of(self, kind: type) -> list[Any]:
        return [message for _, message in self.sent if isinstance(message, kind)]

    def land(self, name: str = "r") -> None:
        self.role.handle(DECODE, PagesLanded(request_id=name, attempt=0), self.now)

    def finish(self) -> None:
        self.engine.pages.check()
        assert self.engine.pages.num_held == 0
        assert not self.role.busy()
        assert self.role.ledger() == {"handoffs": 0, "lent_pages": 0}


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
