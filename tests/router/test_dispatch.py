"""The dispatcher against plain lists of commands, and against a model under random faults."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.common.errors import Overloaded, PenstockError, QueueTimeout, Timeout, Unavailable, WorkerLost
from penstock.common.messages import Abort, Finish, GenerateRequest, Move, Spans, TokenDelta, TokenLogprobs, WorkerInfo
from penstock.common.sampling import SamplingParams
from penstock.router import dispatch
from penstock.router.dispatch import Dispatcher, InvalidTransition, State
from penstock.router.dispatch_events import (
    Blame,
    Cancelled,
    Command,
    Deliver,
    Dequeue,
    Fail,
    Place,
    Placed,
    PlaceFailed,
    Queued,
    Refused,
    Release,
    Reserve,
    SendAbort,
    SendMove,
    SendSubmit,
    Served,
    Shutdown,
    Submitted,
    Tick,
    WorkerComputing,
    WorkerDown,
    WorkerLeaving,
    WorkerStalled,
    WorkerUp,
)
from penstock.router.dispatch_state import WAIT_FOR_WORKER_S
from penstock.router.policy import Placement

STOP = Finish(reason="stop")


def worker(incarnation: str, role: str = "decode") -> WorkerInfo:
    return WorkerInfo(
        worker_id=incarnation,
        incarnation=incarnation,
        role=role,
        address=f"tcp://127.0.0.1/{incarnation}",
        fingerprint="f",
        model="m",
        served_models=["m"],
        page_size=4,
        num_pages=100,
        page_bytes=64,
        max_model_len=128,
        max_num_seqs=8,
        vocab_size=256,
    )


def request(
    request_id: str = "a", choice: int = 0, max_tokens: int = 100, queue_timeout_s: float = 60.0
) -> GenerateRequest:
    sampling = SamplingParams(seed=7, max_tokens=max_tokens)
    return GenerateRequest(
        request_id=request_id,
        choice=choice,
        prompt_token_ids=[1, 2, 3],
        sampling=sampling,
        queue_timeout_s=queue_timeout_s,
    )


def delta(index: int, *token_ids: int, attempt: int = 0, finish: Finish | None = None, of: str = "a") -> TokenDelta:
    return TokenDelta(of, attempt, 0, index, list(token_ids), finish)


def placement(decode: str, prefill: str | None = None) -> Placement:
    return Placement(worker(decode), worker(prefill, "prefill") if prefill else None, 10, 20 if prefill else 0)


class Harness:
    """A dispatcher with one choice "a" whose commands are kept by kind."""

    def __init__(self, max_attempts: int = 3) -> None:
        self.core = Dispatcher(max_attempts, progress_timeout_s=30.0)
        self.all: list[Command] = []
        self.now = 100.0

    def do(self, *events: Any) -> list[Command]:
        commands = [c for event in events for c in self.core.handle(event, self.now)]
        self.all += commands
        return commands

    def tokens(self, *deltas: TokenDelta) -> list[Command]:
        commands = self.core.tokens(deltas, self.now)
        self.all += commands
        return commands

    def run(self, prefill: str | None = None, max_tokens: int = 100) -> None:
        self.do(WorkerUp("d1"), Submitted(request(max_tokens=max_tokens), "sink"))
        self.do(Placed("a", 0, 0, placement("d1", prefill)))

    def delivered(self) -> list[int]:
        return [t for c in self.all if isinstance(c, Deliver) for t in c.delta.token_ids]

    def reserved(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for command in self.all:
            if isinstance(command, Reserve):
                total[command.incarnation] += command.tokens
            elif isinstance(command, Release):
                total[command.incarnation] -= command.tokens
        return {k: v for k, v in total.items() if v}


def the(kind: type[Any], commands: list[Command]) -> Any:
    found = [c for c in commands if isinstance(c, kind)]
    assert len(found) == 1, commands
    return found[0]


def test_who_waits_its_turn_goes_leaves_or_is_told_why_not():
    h = Harness()
    h.do(WorkerUp("d1"), Submitted(request(), "sink"))
    assert h.do(Queued("a", 0)) == [] and h.core.choices["a", 0].state is State.QUEUED
    assert h.do(WorkerDown("d1"), WorkerUp("d1"), Tick()) == [], "it is the queue's, not the workers'"
    assert [type(c) for c in h.do(Placed("a", 0, 0, placement("d1")))] == [Reserve, SendSubmit]
    for event, code in ((Refused("b", 0, Overloaded("no")), "overloaded"), (Shutdown(), "unavailable")):
        h.do(Submitted(request("b"), "sink"), Queued("b", 0))
        commands = h.do(event)
        assert the(Fail, [c for c in commands if isinstance(c, Fail)][-1:]).error.code == code
        assert Dequeue("b", 0) in commands
    h.do(Submitted(request("c"), "sink"), Queued("c", 0))
    h.now += 61.0
    fail, dequeue = h.do(Tick())
    assert type(fail.error) is QueueTimeout and dequeue == Dequeue("c", 0)
    h.do(Submitted(request("d"), "sink"))
    assert h.do(Cancelled("d", 0)) == [] and h.do(Queued("d", 0)) == [Dequeue("d", 0)]


def test_what_runs_at_a_stalled_worker_goes_on_elsewhere():
    h = Harness()
    h.run(prefill="p1")
    abort, *_, place = h.do(WorkerStalled("p1", "no step"))
    assert type(abort) is SendAbort and place.avoid == frozenset(), "the decode worker is not to blame"
    h.do(Placed("a", 0, 1, placement("d1", "p2")))
    h.tokens(delta(0, 5, attempt=1))
    assert h.do(WorkerStalled("p2", "no step")) == [], "its part is done"
    *_, place = h.do(WorkerStalled("d1", "no step"))
    assert place.avoid == {"d1"} and place.request.output_token_ids == [5] and place.request.attempt == 2
    assert h.reserved() == {}


@pytest.mark.parametrize(
    ("spans", "handed_off"),
    [
        (Spans(worker="d1", transfer_pages=3), True),
        (Spans(worker="d1", local_prefill=True, transfer_pages=1), False),
        (Spans(worker="d1"), None),  # it held all of the prompt
        (Spans(worker="p1"), None),
        (None, None),
    ],
)
def test_how_the_hand_off_fared_is_told(spans: Spans | None, handed_off: bool | None):
    h = Harness()
    h.run(prefill="p1")
    commands = h.tokens(TokenDelta("a", 0, 0, 0, [5], STOP, None, spans))
    assert the(Served, commands) == Served("d1", "p1", handed_off)


def test_only_a_workers_own_faults_are_blamed_on_it():
    for code, blamed in (("internal_error", True), ("unavailable", False), ("context_length_exceeded", False)):
        h = Harness()
        h.run()
        commands = h.tokens(delta(0, finish=Finish(reason="error", code=code, message="oh", retryable=True)))
        assert [c for c in commands if isinstance(c, Blame)] == ([Blame("d1", "oh")] if blamed else [])
    h = Harness()
    h.run()
    h.now += 1000.0
    assert the(Blame, h.do(Tick())) == Blame("d1", "a request made no progress")


def test_the_plain_way():
    h = Harness()
    place = the(Place, h.do(WorkerUp("d1"), Submitted(request(), "sink")))
    assert place.request.attempt == 0 and place.avoid == frozenset()
    commands = h.do(Placed("a", 0, 0, placement("d1", "p1")))
    assert [type(c) for c in commands] == [Reserve, Reserve, SendSubmit], "load is reserved before dispatch"
    submit = the(SendSubmit, commands)
    assert submit.incarnation == "d1" and submit.message.prefill == worker("p1", "prefill")
    assert h.reserved() == {"d1": 10, "p1": 20}
    assert h.tokens(delta(0, 5)) == [Release("p1", 20, True), Deliver("sink", delta(0, 5))]
    assert h.tokens(delta(1, 6), delta(2, 7, 8)) == [Deliver("sink", delta(1, 6)), Deliver("sink", delta(2, 7, 8))]
    ended = h.tokens(delta(4, 9, finish=STOP))
    assert ended == [Deliver("sink", delta(4, 9, finish=STOP)), Served("d1", "p1", None), Release("d1", 10)]
    assert not h.core.choices and h.reserved() == {}
    assert h.tokens(delta(5, 10)) == [] and h.core.stale_deltas == 1


def test_a_prompt_computed_by_the_decode_worker_weighs_until_a_token_comes():
    h = Harness()
    h.do(WorkerUp("d1"), Submitted(request(), "sink"), Placed("a", 0, 0, Placement(worker("d1"), None, 10, 500)))
    assert h.reserved() == {"d1": 510}
    assert h.tokens(delta(0, 5)) == [Release("d1", 500, True), Deliver("sink", delta(0, 5))]
    assert h.reserved() == {"d1": 10}
    h.do(Cancelled("a", 0))
    assert h.reserved() == {}


def test_two_senders_are_put_in_order_and_repeats_dropped():
    h = Harness()
    h.run(prefill="p1")
    assert h.tokens(delta(1, 6), delta(3, 8)) == []
    h.tokens(delta(0, 5))
    assert h.delivered() == [5, 6]
    h.tokens(delta(0, 5), delta(1, 6, 7))  # the second overlaps by one
    assert h.delivered() == [5, 6, 7, 8]
    h.tokens(delta(5, finish=STOP), delta(4, 9))
    assert h.delivered() == [5, 6, 7, 8, 9] and h.reserved() == {} and not h.core.choices


def test_an_overlap_takes_its_logprobs_along():
    h = Harness()
    h.run()
    one, two = TokenLogprobs(-1.0, 1, [6], [-1.0]), TokenLogprobs(-2.0, 1, [7], [-2.0])
    h.tokens(delta(0, 5), delta(1, 6))
    commands = h.tokens(TokenDelta("a", 0, 0, 1, [6, 7], None, [one, two]))
    assert commands == [Deliver("sink", TokenDelta("a", 0, 0, 2, [7], None, [two]))]


def test_a_lost_worker_means_another_attempt_behind_what_was_delivered():
    h = Harness()
    h.run()
    h.tokens(delta(0, 5), delta(1, 6))
    commands = h.do(WorkerDown("d1"))
    place = the(Place, commands)
    assert place.avoid == {"d1"} and place.request.output_token_ids == [5, 6] and place.request.attempt == 1
    assert place.lost == "its worker was lost" and h.reserved() == {}
    again = the(SendSubmit, h.do(Placed("a", 0, 1, placement("d2")))).message.request
    assert again.prompt_token_ids == [1, 2, 3] and again.output_token_ids == [5, 6] and again.sampling.seed == 7
    assert h.tokens(delta(2, 99)) == [], "tokens of the old attempt"
    h.tokens(delta(2, 7, attempt=1, finish=STOP))
    assert h.delivered() == [5, 6, 7] and h.core.retries == 1


def test_a_later_attempt_gives_back_its_prefill_load_with_its_first_token():
    h = Harness()
    h.run()
    h.tokens(delta(0, 5))
    h.do(WorkerDown("d1"), Placed("a", 0, 1, placement("d2", "p1")))
    assert h.tokens(delta(1, 6, attempt=1)) == [Release("p1", 20, True), Deliver("sink", delta(1, 6, attempt=1))]


@pytest.mark.parametrize("cut_first", [True, False])
def test_a_first_token_lost_in_a_cut_is_tried_again(cut_first: bool):
    h = Harness()
    h.run(prefill="p1")
    if cut_first:  # the decode worker has its pages and goes on behind a token that nobody will send again
        h.do(WorkerDown("p1"))
        commands = h.tokens(delta(1, 11))
    else:
        assert h.tokens(delta(1, 11)) == []  # it may only be late
        commands = h.do(WorkerDown("p1"))
    assert the(SendAbort, commands).incarnation == "d1"
    assert the(Place, commands).request.attempt == 1
    h.do(Placed("a", 0, 1, placement("d1", "p1")))
    assert h.tokens(delta(1, 11, attempt=1)) == []  # the new attempt's link to the prefill worker is whole
    h.tokens(delta(0, 10, attempt=1), delta(2, 12, attempt=1, finish=STOP))
    assert h.delivered() == [10, 11, 12]
    assert h.reserved() == {}


def test_a_prefill_worker_lost_is_the_decode_workers_business():
    h = Harness()
    h.run(prefill="p1")
    assert h.do(WorkerDown("p1")) == [Release("p1", 20, True)]
    h.tokens(delta(0, 5, finish=STOP))
    assert h.delivered() == [5] and h.reserved() == {}


def test_a_diverging_repeat_ends_the_attempt():
    h = Harness()
    h.run(prefill="p1")
    h.tokens(delta(0, 5))
    commands = h.tokens(delta(0, 6))
    assert the(SendAbort, commands).message.attempt == 0
    assert the(Place, commands).request.output_token_ids == [5]
    assert h.core.divergences == 1 and h.reserved() == {}


def test_a_finish_before_what_was_delivered_diverges():
    h = Harness()
    h.run()
    h.tokens(delta(0, 5), delta(1, 6), delta(2, 7))
    the(Place, h.tokens(delta(1, 6, finish=STOP)))


def test_a_leaving_worker_gives_its_choices_up():
    """Behind its last token, not counted as a failed attempt, and the next attempt knows where it comes from."""
    h = Harness(max_attempts=1)
    h.run(prefill="p1")
    h.do(WorkerUp("d2"))
    moved = Finish(reason="moved")
    assert the(SendMove, h.do(WorkerLeaving("d1"))).message == Move(request_id="a", attempt=0)
    assert h.do(WorkerLeaving("d1"), WorkerLeaving("d9")) == []  # asked already; nothing runs there
    assert h.tokens(delta(1, 6)) == []
    assert h.tokens(delta(2, finish=moved)) == []  # the first token is still on its way from the prefill worker
    place = the(Place, h.tokens(delta(0, 5)))
    assert place.request.output_token_ids == [5, 6] and place.source == worker("d1") and place.avoid == frozenset()
    assert h.core.moves == 1 and h.core.retries == 0 and h.reserved() == {}
    h.do(Placed("a", 0, 1, placement("d2")))
    assert the(SendMove, h.do(WorkerLeaving("d2"))).message.attempt == 1  # and again
    h.tokens(delta(2, 7, attempt=1), delta(3, attempt=1, finish=moved))
    h.do(Placed("a", 0, 2, placement("d1")))
    h.tokens(delta(3, 8, attempt=2, finish=STOP))
    assert h.delivered() == [5, 6, 7, 8] and h.reserved() == {}
    h = Harness(max_attempts=2)
    h.run()
    h.do(WorkerUp("d2"), WorkerLeaving("d1"))
    h.tokens(delta(0, finish=moved))
    h.do(Placed("a", 0, 1, placement("d2")))
    again = the(Place, h.do(WorkerDown("d2")))
    assert again.source is None and again.avoid == {"d2"}  # a lost attempt has no pages to come with


def test_errors_of_a_worker():
    retry = Finish(reason="error", code="queue_timeout", message="full", retryable=True)
    h = Harness(max_attempts=2)
    h.run()
    assert the(Place, h.tokens(delta(0, finish=retry))).avoid == {"d1"}
    h.do(Placed("a", 0, 1, placement("d2")))
    assert isinstance(the(Fail, h.tokens(delta(0, attempt=1, finish=retry))).error, QueueTimeout)
    h = Harness()
    h.run()
    error = the(Fail, h.tokens(delta(0, finish=Finish(reason="error", code="nonsense", message="boom")))).error
    assert error.code == "internal_error" and error.message == "boom" and h.reserved() == {}


@pytest.mark.parametrize(("left", "error"), [(["d9"], WorkerLost), ([], Unavailable)])
def test_attempts_are_bounded(left: list[str], error: type[PenstockError]):
    h = Harness(max_attempts=2)
    h.run()
    h.do(*(WorkerUp(one) for one in left), WorkerUp("d2"))
    h.do(WorkerDown("d1"), Placed("a", 0, 1, placement("d2")))
    failure = the(Fail, h.do(WorkerDown("d2"))).error
    assert type(failure) is error and h.reserved() == {} and not h.core.choices


def test_all_tokens_delivered_but_the_finish_lost():
    h = Harness()
    h.run(max_tokens=2)
    h.tokens(delta(0, 5), delta(1, 6))
    last = the(Deliver, h.do(WorkerDown("d1"))).delta
    assert last.token_ids == [] and last.index == 2 and last.finish == Finish(reason="length")
    assert not h.core.choices


def test_without_a_worker_a_request_waits_a_while():
    h = Harness()
    h.do(Submitted(request(), "sink"))
    assert h.do(Placed("a", 0, 0, None)) == []
    h.now += WAIT_FOR_WORKER_S / 2
    assert the(Place, h.do(WorkerUp("d1"))).request.attempt == 0
    h.do(Placed("a", 0, 0, None))
    h.now += WAIT_FOR_WORKER_S + 0.1
    assert isinstance(the(Fail, h.do(Tick())).error, Unavailable)


def test_a_request_waits_for_a_worker_no_longer_than_for_room():
    h = Harness()
    h.do(Submitted(request(queue_timeout_s=2.0), "sink"), Placed("a", 0, 0, None))
    h.now += 1.9
    assert h.do(Tick()) == []
    h.now += 0.2
    assert str(the(Fail, h.do(Tick())).error) == "no worker came up within 2 s"


def test_few_may_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "MAX_WAITING", 1)
    h = Harness()
    for name in ("a", "b"):
        h.do(Submitted(request(name), name))
        h.do(Placed(name, 0, 0, None))
    assert the(Fail, h.all).sink == "b"


def test_progress_moves_the_deadline():
    h = Harness()
    h.run()
    h.now += 60 + 29  # queue timeout and progress timeout together
    assert h.do(Tick()) == []
    h.tokens(delta(0, 5), delta(1, 6))
    h.now += 29
    assert h.do(Tick()) == []
    h.now += 2
    commands = h.do(Tick())
    assert isinstance(the(Fail, commands).error, Timeout) and the(SendAbort, commands).incarnation == "d1"
    assert h.reserved() == {}


@pytest.mark.parametrize("computing", ["p1", "d1"])
def test_a_long_prompt_is_not_late_while_its_worker_computes(computing: str):
    h = Harness()
    h.run(prefill="p1")
    for _ in range(20):  # 500 s, where 90 without a token are too many
        h.now += 25.0
        assert h.do(WorkerComputing(computing), Tick()) == []
    h.now += 25.0
    assert h.do(WorkerComputing("p2"), Tick()) == [], "what others do says nothing, and it is not late yet"
    h.now += 25.0
    assert type(the(Fail, h.do(WorkerComputing("p2"), Tick())).error) is Timeout


def test_a_request_that_a_busy_worker_has_forgotten_ends_at_last():
    h = Harness()
    h.run(prefill="p1")
    minutes = 0
    while not (commands := h.do(WorkerComputing("p1"), Tick())):
        h.now += 60.0
        minutes += 1
        assert minutes < 100
    assert type(the(Fail, commands).error) is Timeout and minutes > 10


@pytest.mark.parametrize("came", [0, 1])
def test_a_token_that_is_missing_is_missed_however_busy_its_worker_is(came: int):
    h = Harness()
    h.run(prefill="p1")
    h.tokens(delta(came, 5))  # the first one, or one behind it
    h.now += 91.0
    assert type(the(Fail, h.do(WorkerComputing("d1"), Tick())).error) is Timeout


def test_cancel_in_every_state():
    for state in State:
        h = Harness()
        h.do(Submitted(request(), "sink"))
        if state is State.QUEUED:
            h.do(Queued("a", 0))
        elif state is not State.PLACING:
            h.do(Placed("a", 0, 0, placement("d1") if state is State.RUNNING else None))
        assert h.core.choices["a", 0].state is state
        commands = h.do(Cancelled("a", 0))
        expected = {State.RUNNING: [SendAbort, Release], State.QUEUED: [Dequeue]}
        assert [type(c) for c in commands] == expected.get(state, [])
        assert not h.core.choices and h.do(Cancelled("a", 0)) == []
        assert h.do(Placed("a", 0, 0, placement("d1"))) == [], "the answer to a cancelled question"


def test_a_failure_of_ours_while_placing_is_answered():
    h = Harness()
    h.do(Submitted(request(), "sink"))
    assert the(Fail, h.do(PlaceFailed("a", 0, 0))).error.code == "internal_error" and not h.core.choices


def test_shutdown_in_every_state():
    for state in State:
        h = Harness()
        h.do(Submitted(request(), "sink"))
        if state is State.QUEUED:
            h.do(Queued("a", 0))
        elif state is not State.PLACING:
            h.do(Placed("a", 0, 0, placement("d1") if state is State.RUNNING else None))
        assert isinstance(the(Fail, h.do(Shutdown())).error, Unavailable)
        assert not h.core.choices and h.reserved() == {}


def test_choices_of_one_request_are_apart():
    h = Harness()
    for choice in (0, 1):
        h.do(Submitted(request("a", choice), choice))
    h.do(Placed("a", 0, 0, placement("d1")), Placed("a", 1, 0, placement("d1")))
    assert h.tokens(TokenDelta("a", 0, 1, 0, [8])) == [Deliver(1, TokenDelta("a", 0, 1, 0, [8]))]
    assert the(SendAbort, h.do(Cancelled("a", 1))).message == Abort(request_id="a", choice=1, attempt=0)
    assert list(h.core.choices) == [("a", 0)]


def test_tokens_kept_for_their_turn_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "MAX_EARLY", 10)
    h = Harness()
    h.run()
    h.tokens(*(delta(i, i) for i in range(1, 11)))
    assert the(SendAbort, h.tokens(delta(11, 11))).message.attempt == 0


def test_an_id_in_use_and_an_impossible_event_raise():
    h = Harness()
    h.run()
    with pytest.raises(ValueError, match="under way"):
        h.do(Submitted(request(), "other"))
    with pytest.raises(InvalidTransition, match=r"placing #0.*running #0: Placed"):
        h.do(Placed("a", 0, 0, placement("d1")))


class Faults(RuleBasedStateMachine):
    """Random workers that repeat, reorder, fail and die. What each client gets must be the oracle's tokens, once.

    Every attempt would go on in its own way, so a token of an older attempt is a wrong token.
    """

    WORKERS = ("d1", "d2", "d3")

    def __init__(self) -> None:
        super().__init__()
        self.core = Dispatcher(max_attempts=4, progress_timeout_s=30.0)
        self.now = 0.0
        self.up = {"d1", "d2"}
        self.names = 0
        self.oracle: dict[str, list[int]] = {}
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.to_place: list[Place] = []
        self.queued: set[str] = set()
        self.queued_before: set[str] = set()
        self.sent: dict[str, tuple[str, int, int]] = {}  # request -> worker, attempt, first index: what runs now
        self.network: list[TokenDelta] = []
        self.to_move: list[Move] = []
        self.reserved: Counter[str] = Counter()
        for one in self.up:
            self.core.handle(WorkerUp(one), self.now)

    def apply(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Place):
                self.to_place.append(command)
            elif isinstance(command, Dequeue):
                self.queued.discard(command.request_id)
            elif isinstance(command, SendSubmit):
                self.queued.discard(command.message.request.request_id)
                assert command.incarnation in self.up
                request = command.message.request
                assert request.output_token_ids == self.got[request.request_id]
                self.sent[request.request_id] = command.incarnation, request.attempt, len(request.output_token_ids)
                self.compute(request.request_id)
            elif isinstance(command, Deliver):
                name = command.sink
                assert name not in self.ended, "nothing comes after the end"
                assert command.delta.index == len(self.got[name])
                self.got[name] += command.delta.token_ids
                assert self.got[name] == self.oracle[name][: len(self.got[name])]
                if command.delta.finish is not None:
                    assert self.got[name] == self.oracle[name]
                    self.ended[name] = "finished"
            elif isinstance(command, SendMove):
                name = command.message.request_id
                assert self.sent[name][:2] == (command.incarnation, command.message.attempt)
                self.to_move.append(command.message)
            elif isinstance(command, Fail):
                assert command.sink not in self.ended
                self.ended[command.sink] = command.error.code
            elif isinstance(command, Reserve):
                self.reserved[command.incarnation] += command.tokens
            elif isinstance(command, Release):
                self.reserved[command.incarnation] -= command.tokens
                assert self.reserved[command.incarnation] >= 0

    def compute(self, name: str) -> None:
        """All that this attempt will say goes on the network; rules decide in what order it comes, and how often."""
        _, attempt, first = self.sent[name]
        tokens = self.oracle[name]
        tokens[first:] = [1000 * (attempt + 1) + i for i in range(first, len(tokens))]
        for i in range(first, len(tokens)):
            finish = STOP if i == len(tokens) - 1 else None
            self.network.append(TokenDelta(name, attempt, 0, i, [tokens[i]], finish))
            if i + 2 < len(tokens):
                self.network.append(TokenDelta(name, attempt, 0, i, tokens[i : i + 2], None))

    @rule(length=st.integers(1, 8))
    def submit(self, length: int) -> None:
        name = f"r{self.names}"
        self.names += 1
        self.oracle[name], self.got[name] = [0] * length, []
        self.apply(self.core.handle(Submitted(request(name, max_tokens=50), name), self.now))

    @precondition(lambda self: self.to_place)
    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        waiting, self.to_place = self.to_place, []
        for command in waiting:
            if command.request.attempt == 0 and data.draw(st.booleans()):
                self.admission(command, data)
                continue
            where = data.draw(st.sampled_from(sorted(self.up))) if self.up else None
            prefill = data.draw(st.sampled_from([None, "p1"]))
            found = placement(where, prefill) if where else None
            self.queued.discard(command.request.request_id)
            self.apply(
                self.core.handle(Placed(command.request.request_id, 0, command.request.attempt, found), self.now)
            )

    def admission(self, command: Place, data: st.DataObject) -> None:
        """It waits its turn, which comes later or never, or is refused; it may have been cancelled since it asked."""
        name = command.request.request_id
        if data.draw(st.booleans()):
            self.apply(self.core.handle(Refused(name, 0, Overloaded("full")), self.now))
        else:
            self.to_place.append(command)
            if name not in self.queued_before:
                self.queued_before.add(name)
                self.queued.add(name)
                self.apply(self.core.handle(Queued(name, 0), self.now))

    @precondition(lambda self: self.network)
    @rule(picks=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=8))
    def arrive(self, picks: list[tuple[int, bool]]) -> None:
        """Some tokens arrive, near their order, some of them not for the last time."""
        burst = []
        for pick, again in picks:
            if self.network:
                burst.append(self.network[pick % len(self.network)])
                if not again:
                    self.network.remove(burst[-1])
        self.apply(self.core.tokens(burst, self.now))

    @precondition(lambda self: self.network)
    @rule()
    def one_arrives_in_order(self) -> None:
        self.apply(self.core.tokens([self.network.pop(0)], self.now))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def diverge(self, data: st.DataObject) -> None:
        """A worker repeats a delivered token with another id."""
        name = data.draw(st.sampled_from(sorted(self.sent)))
        if self.got[name]:
            _, attempt, _ = self.sent[name]
            wrong = self.got[name][-1] + 1
            self.apply(self.core.tokens([TokenDelta(name, attempt, 0, len(self.got[name]) - 1, [wrong])], self.now))

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), retryable=st.booleans())
    def worker_error(self, data: st.DataObject, retryable: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.sent)))
        finish = Finish(reason="error", code="timeout", message="", retryable=retryable)
        self.apply(self.core.tokens([TokenDelta(name, self.sent[name][1], 0, 0, [], finish)], self.now))

    @rule(incarnation=st.sampled_from(WORKERS))
    def worker_leaving(self, incarnation: str) -> None:
        self.apply(self.core.handle(WorkerLeaving(incarnation), self.now))

    @precondition(lambda self: self.to_move)
    @rule(data=st.data())
    def worker_gives_up(self, data: st.DataObject) -> None:
        """Behind some token that has not been delivered; what it would have said after that is never said."""
        move = self.to_move.pop(0)
        name, attempt = move.request_id, move.attempt
        if self.sent[name][1] != attempt or len(self.got[name]) == len(self.oracle[name]):
            return
        first = max(len(self.got[name]), self.sent[name][2])
        end = data.draw(st.integers(first, len(self.oracle[name]) - 1))
        self.network = [
            delta
            for delta in self.network
            if (delta.request_id, delta.attempt) != (name, attempt) or delta.index + len(delta.token_ids) <= end
        ]
        self.network.append(TokenDelta(name, attempt, 0, end, [], Finish(reason="moved")))

    @rule(incarnation=st.sampled_from(WORKERS))
    def worker_up(self, incarnation: str) -> None:
        if incarnation not in self.up:
            self.up.add(incarnation)
            self.apply(self.core.handle(WorkerUp(incarnation), self.now))

    @rule(incarnation=st.sampled_from((*WORKERS, "p1")))
    def worker_computing(self, incarnation: str) -> None:
        self.apply(self.core.handle(WorkerComputing(incarnation), self.now))

    @rule(incarnation=st.sampled_from((*WORKERS, "p1")))
    def worker_down(self, incarnation: str) -> None:
        self.up.discard(incarnation)
        self.apply(self.core.handle(WorkerDown(incarnation), self.now))

    @precondition(lambda self: self.oracle)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.oracle)))
        self.apply(self.core.handle(Cancelled(name, 0), self.now))
        self.ended.setdefault(name, "cancelled")

    @rule(seconds=st.sampled_from([1.0, 11.0, 31.0, 91.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.apply(self.core.handle(Tick(), self.now))

    @invariant()
    def ledger(self) -> None:
        assert {name for name, _ in self.core.choices} == set(self.oracle) - set(self.ended)
        queued = {name for (name, _), choice in self.core.choices.items() if choice.state is State.QUEUED}
        assert queued == self.queued, "who waits no longer is taken out of the queue"
        held = Counter[str]()
        for choice in self.core.choices.values():
            for release in (choice.reserved, choice.prompt_reserved):
                if release is not None:
                    held[release.incarnation] += release.tokens
        assert +held == +self.reserved

    def teardown(self) -> None:
        self.up.add("d1")
        self.apply(self.core.handle(WorkerUp("d1"), self.now))
        for _ in range(40):  # from here on nothing fails: everything that is left must end
            while self.to_place:
                command = self.to_place.pop(0).request
                self.queued.discard(command.request_id)
                self.apply(self.core.handle(Placed(command.request_id, 0, command.attempt, placement("d1")), self.now))
            network, self.network = self.network, []
            for one in network:
                self.apply(self.core.tokens([one], self.now))
        assert set(self.ended) == set(self.oracle) and not self.core.choices, "nothing hangs once all tokens came"
        assert +self.reserved == Counter()


TestFaults = Faults.TestCase
TestFaults.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
