"""The lender's side of a hand-off."""

from __future__ import annotations

import pytest

from penstock.common.messages import (
    Abort,
    Finish,
    PagesReady,
    PrefillDone,
    PrefillFailed,
    TokenBatch,
)
from penstock.kv_transfer.mover import Sealed
from tests.engine.test_scheduler import oracle
from tests.kv_transfer.noting import KnownRates
from tests.prefill_worker.cases import DECODE, PROMPT, Case


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
    case.now += 0.25
    case.seal_all()
    assert case.of(PrefillDone)[0].held_ms == 250.0
    tickets = case.of(PagesReady)
    assert [(t.first_page, len(t.pages[0]), t.num_tokens) for t in tickets] == [(0, 1, 4), (1, 1, 8), (2, 1, 10)]
    assert all(t.checksums == [[7]] for t in tickets)
    assert case.sent[-1][1] is case.of(PrefillDone)[0]
    assert case.of(PrefillDone)[0].token_ids == oracle(PROMPT, 1)
    assert case.role.load()["lent_pages"] == 3
    assert case.role.load()["handoffs"] == 0  # the decode worker counts it, where failures are counted
    case.land()
    case.finish()


def test_how_much_moves_while_a_token_is_computed_is_known_where_both_rates_are() -> None:
    for link, computed, moved in ((0.0, 100.0, 0.0), (8e9, 0.0, 0.0), (8e9, 100.0, 8e9 / (4 << 20) / 100.0)):
        case = Case()
        case.engine.rates = KnownRates(prefill_tokens_per_s=computed)
        case.prefill(link_bytes_per_s=link)
        request = case.engine.scheduler.get("r:0:0")
        assert request is not None and request.moved_per_token == moved
        case.role.handle(DECODE, Abort(request_id="r", attempt=0), case.now)
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


def test_a_prompt_that_fills_this_workers_context_goes_on_in_the_decode_workers() -> None:
    case = Case(checksum="off")
    case.engine.scheduler.max_model_len = len(PROMPT) + 1
    case.prefill()
    for _ in range(3):
        case.step()
    (done,) = case.of(PrefillDone)
    assert len(done.token_ids) == 1 and done.finish is None
    case.land()
    case.finish()


def test_choices_that_come_together_have_their_prompt_computed_once() -> None:
    case = Case(checksum="off")
    for choice in range(3):
        case.prefill(max_tokens=1, choice=choice)
    for _ in range(5):
        case.step()
    tokens = {d.choice: d.token_ids for batch in case.of(TokenBatch) for d in batch.deltas}
    assert tokens == dict.fromkeys(range(3), oracle(PROMPT, 1))
    assert case.engine.scheduler.counters.prompt_tokens == len(PROMPT) + 2 * (len(PROMPT) - 8)
    for choice in range(3):
        case.land(choice=choice)
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


def test_a_ticket_does_not_wait_for_the_step_after_its_own() -> None:
    """On a GPU that step is submitted before the checksums are there, and may take 0.2 s."""
    case = Case(run_ahead=1)
    case.prefill(name="first")
    case.prefill(name="second")
    while not case.of(TokenBatch):
        case.step()
        case.seal_all()
    case.executor.busy = True
    case.step()
    assert case.engine.awaited is not None, "the second prompt's step is under way"
    before = len(case.of(PagesReady))
    case.seal_all()
    case.step()
    assert len(case.of(PagesReady)) + len(case.of(PrefillDone)) > before
    assert [done.request_id for done in case.of(PrefillDone)] == ["first"]
    case.executor.busy = False
    while len(case.of(PrefillDone)) < 2:
        case.step()
        case.seal_all()
    case.land("first")
    case.land("second")
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
            assert {job.tag for job in case.mover.seals} == set(case.mover.cancelled)
            case.seal_all()  # these were done already
            while case.engine.has_work():  # pages that a submitted step writes go with its result
                assert case.engine.pages.num_held > 0
                case.step()
            case.finish()


def test_a_peer_that_is_gone_loses_everything() -> None:
    case = Case()
    case.prefill()
    case.prefill(name="other")
    for _ in range(3):
        case.step()
    case.seal_all()
    assert case.role.busy()
    case.role.peer_gone(DECODE)
    assert case.role.load()["expired_loans"] == 2
    case.finish()


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_peer_found_silent_before_its_last_chunk(run_ahead: int) -> None:
    case = Case(checksum="off", run_ahead=run_ahead)
    case.prefill()
    for _ in range(2 + run_ahead):
        case.step()
    assert len(case.of(PagesReady)) == 2
    case.role.peer_gone(DECODE)
    case.step()
    assert len(case.of(PagesReady)) == 2
    assert case.of(PrefillDone) == []
    case.finish()


def test_loans_last_as_long_as_their_session() -> None:
    case = Case(checksum="off")
    case.prefill()
    for _ in range(3):
        case.step()
    case.now += 1000.0
    case.role.tick(case.now)
    assert case.role.load()["lent_pages"] == 3
    case.land()
    case.finish()


def test_while_pages_are_lent_the_mover_stays_quick() -> None:
    case = Case(checksum="off")
    case.prefill()
    for _ in range(3):
        case.step()
    before = case.mover.readers_expected
    for _ in range(100):
        case.now += 0.1
        case.role.tick(case.now)
    assert 9 <= case.mover.readers_expected - before <= 11, "once a second, however slow the link"
    case.land()
    before = case.mover.readers_expected
    case.now += 5.0
    case.role.tick(case.now)
    assert case.mover.readers_expected == before
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


def test_chunks_are_sealed_one_behind_the_other() -> None:
    case = Case()
    for name in ("r", "other"):
        case.prefill(name=name)
        for _ in range(3):
            case.step()
    lines = [job.line for job in case.mover.seals]
    assert lines == [lines[0]] * 3 + [lines[3]] * len(lines[3:]) and lines[0] != lines[3]
    case.seal_all()
    case.land()
    case.land("other")
    case.finish()


def test_a_prompt_that_is_asked_for_twice_is_computed_and_lent_once() -> None:
    case = Case(checksum="off")
    for _ in range(3):
        case.prefill()
        case.step()
    assert [t.first_page for t in case.of(PagesReady)] == [0, 1, 2] and case.engine.steps == 3
    assert len(case.of(PrefillDone)) == 1 and case.of(PrefillFailed) == []
    case.land()
    case.finish()


def test_nobody_else_gives_up_a_decode_workers_prompt() -> None:
    case = Case(checksum="off")
    case.prefill()
    case.step()
    case.role.handle(b"decode/2", Abort(request_id="r", attempt=0), case.now)
    case.step()
    case.step()
    assert len(case.of(PagesReady)) == 3 and len(case.of(PrefillDone)) == 1
    case.land()
    case.finish()


@pytest.mark.parametrize("end", ["gone", "landed"])
def test_whose_reader_is_gone_or_has_had_enough_is_not_computed_on(end: str) -> None:
    case = Case(checksum="off")
    case.prefill()
    case.step()
    assert len(case.of(PagesReady)) == 1 and case.engine.has_work()
    if end == "gone":
        case.role.peer_gone(DECODE)
    else:
        case.land()
    assert not case.engine.has_work() and case.engine.steps == 1
    case.finish()


def test_who_is_given_up_with_the_engine_is_told_so() -> None:
    case = Case(checksum="off")
    case.prefill()
    case.prefill(name="other")
    case.role.give_up(Finish(reason="error", code="unavailable", message="the worker shut down", retryable=True))
    failed = {(message.request_id, message.code, message.message) for message in case.of(PrefillFailed)}
    assert failed == {(name, "unavailable", "the worker shut down") for name in ("r", "other")}
    assert case.role.ledger()["handoffs"] == 0
