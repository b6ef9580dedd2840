"""What a decode worker refuses, hears twice, or must forget with a router or a leaving request's next worker."""

from __future__ import annotations

import pytest

from penstock.common.messages import Fetch, Finish, GenerateRequest, Move, Submit
from penstock.common.sampling import SamplingParams
from penstock.engine.request import Request
from tests.decode_worker.test_role import PROMPT, ROUTER, Case, move
from tests.engine.test_scheduler import oracle


def submit(name: str, prompt: list[int], output: list[int] | None = None) -> Submit:
    params = SamplingParams(max_tokens=5)
    return Submit(
        request=GenerateRequest(
            request_id=name, prompt_token_ids=prompt, output_token_ids=output or [], sampling=params
        )
    )


def test_with_a_router_go_its_requests_and_nobody_elses() -> None:
    case = Case()
    for name in ("runs", "waits", "kept"):
        prompt = [1, 2, 0] * 11 if name == "runs" else [2, 1, 0] * 11
        case.role.handle(ROUTER if name == "kept" else b"router/2", submit(name, prompt), 0.0)
        case.step()
    assert case.role.ledger()["admission"] == 2 and case.role.ledger()["requests"] == 1
    case.role.peer_gone(b"router/2")
    assert case.role.ledger()["admission"] == 1 and case.role.ledger()["requests"] == 0
    case.finish()
    assert case.tokens("kept") == oracle([2, 1, 0] * 11, 5)


@pytest.mark.parametrize("waits", [True, False])
def test_a_request_that_comes_twice_is_answered_once(waits: bool) -> None:
    case = Case()
    if waits:
        case.submit("first", [1, 2, 0] * 18, max_tokens=1)
    for _ in range(2):
        case.submit("r", PROMPT)
        case.step()
    assert case.role.ledger()["requests"] + case.role.ledger()["admission"] == 1 + waits
    case.finish()
    assert case.tokens("r") == oracle(PROMPT, 5)


def test_what_cannot_be_answered_is_refused_with_the_reason() -> None:
    case = Case()
    case.role.handle(ROUTER, submit("long", [1] * 60, output=[2] * 4), 0.0)  # all of the context
    case.role.handle(ROUTER, submit("fits", [1] * 60, output=[2] * 3), 0.0)
    case.role.handle(ROUTER, submit("empty", []), 0.0)
    case.role._loop.peers.draining = True
    case.role.handle(ROUTER, submit("late", PROMPT), 0.0)
    case.finish()
    ends = {name: case.deltas(name)[-1].finish for name in ("long", "fits", "empty", "late")}
    assert {name: (end.reason, end.code, end.retryable) for name, end in ends.items() if end} == {
        "long": ("error", "context_length_exceeded", False),
        "fits": ("length", "", False),
        "empty": ("error", "invalid_request", False),
        "late": ("error", "unavailable", True),
    }


def test_what_moved_is_given_up_here_once_it_has_been_asked_for() -> None:
    case = Case()
    case.submit("r", PROMPT, max_tokens=20)
    case.step()
    case.step()
    assert (finish := move(case, "r").finish) is not None and finish.kept_tokens
    held = case.engine.pages.num_held
    scope, request = case.engine.scheduler.hash_scope, Request(submit("r", PROMPT).request, 0.0)
    hashes = list(request.extend_hashes(scope, 4, len(PROMPT)))
    case.role.handle(b"decode-1", Fetch(request_id="r", attempt=1, first_page=0, hashes=hashes), 0.0)
    assert case.role.load()["lent_pages"] == len(hashes) < held == 3
    assert case.engine.pages.num_held == len(hashes), "what it did not want is anybody's"
    case.role.peer_gone(b"decode-1")
    case.finish()


def test_who_is_given_up_with_the_engine_is_told_so_wherever_it_is() -> None:
    case = Case()
    case.submit("moves", PROMPT, max_tokens=20)
    case.step()
    case.step()
    tail = case.engine.pages.table("moves:0:0")[-1]
    case.engine.pages.hold("step", [tail])  # one that still writes it
    case.role.handle(ROUTER, Move(request_id="moves", attempt=0), 0.0)
    case.role.tick(0.0)
    case.submit("runs", [1, 2, 0] * 10)
    case.submit("waits", [2, 1, 0] * 10)
    assert case.role.ledger()["admission"] == 1 and case.deltas("moves")[-1].finish is None
    case.engine.pages.release("step")
    case.role.give_up(Finish(reason="error", code="unavailable", message="the worker shut down", retryable=True))
    case.replies.flush()
    ends = {name: case.deltas(name)[-1].finish for name in ("moves", "runs", "waits")}
    assert {name: end.reason for name, end in ends.items() if end} == {
        "moves": "moved",
        "runs": "error",
        "waits": "error",
    }
    case.role.tick(11.0)
    case.finish()
    assert case.tokens("runs") == case.tokens("waits") == [], "nothing comes behind the end"
