"""The dispatcher against plain lists of commands."""

from __future__ import annotations

import functools

import msgspec
import pytest

from penstock.common.errors import PenstockError, QueueTimeout, Unavailable, WorkerLost
from penstock.common.messages import Abort, Finish, Spans, TokenDelta, TokenLogprobs
from penstock.common.sampling import SamplingParams
from penstock.router import dispatch
from penstock.router.dispatch import InvalidTransition
from penstock.router.dispatch_events import (
    Blame,
    Cancelled,
    Deliver,
    Fail,
    Give,
    Place,
    Placed,
    Release,
    Reserve,
    SendAbort,
    SendSubmit,
    Served,
    Submitted,
    Tick,
    WorkerDown,
    WorkerStalled,
    WorkerUp,
)
from penstock.router.policy import EXPECTED_OUTPUT_TOKENS, Placement
from penstock.router.rates import H200_LLAMA8B
from tests.router.dispatching import STOP, Harness, delta, placement, request, the, worker


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
    end = [Served("d1", "p1", None), Release("d1", 10), Give("d1", H200_LLAMA8B.output_ms(3, 5))]
    assert ended == [Deliver("sink", delta(4, 9, finish=STOP)), *end]
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
    h.tokens(delta(3, 8), delta(2, 7, 8))
    assert h.delivered() == [5, 6, 7, 8] and h.core.divergences == 0
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
    assert the(Give, commands) == Give("d1", H200_LLAMA8B.output_ms(3, 2))
    again = the(SendSubmit, h.do(Placed("a", 0, 1, placement("d2")))).message.request
    assert again.prompt_token_ids == [1, 2, 3] and again.output_token_ids == [5, 6] and again.sampling.seed == 7
    assert h.tokens(delta(2, 99)) == [], "tokens of the old attempt"
    ended = h.tokens(delta(2, 7, attempt=1, finish=STOP))
    assert the(Give, ended) == Give("d2", 0.0), "one token, which comes with the prompt"
    assert h.delivered() == [5, 6, 7] and h.core.retries == 1


def test_what_a_lost_attempt_said_too_early_is_forgotten():
    h = Harness()
    h.run(prefill="p1")
    h.tokens(delta(1, 98, finish=STOP))
    h.do(WorkerDown("d1"), Placed("a", 0, 1, placement("d2", "p1")))
    h.tokens(delta(0, 5, attempt=1), delta(1, 6, attempt=1))
    assert h.delivered() == [5, 6] and h.core.choices and h.core.divergences == 0


def test_an_output_that_is_longer_than_expected_counts_as_twice_as_long():
    h, output_ms = Harness(), functools.partial(H200_LLAMA8B.output_ms, 3)
    guess_ms = output_ms(EXPECTED_OUTPUT_TOKENS)
    h.do(WorkerUp("d1"), Submitted(request(max_tokens=10_000), "sink"))
    h.do(Placed("a", 0, 0, Placement(worker("d1"), None, 10, decode_ms=guess_ms)))
    h.tokens(delta(0, *range(EXPECTED_OUTPUT_TOKENS)))
    assert h.do(Tick()) == []
    h.tokens(delta(EXPECTED_OUTPUT_TOKENS, 5))
    [longer] = h.do(Tick())
    assert longer == Give("d1", output_ms(2 * EXPECTED_OUTPUT_TOKENS) - guess_ms) and h.do(Tick()) == []
    h.tokens(delta(EXPECTED_OUTPUT_TOKENS + 1, *range(4 * EXPECTED_OUTPUT_TOKENS)))
    [longer_still] = h.do(Tick())
    given_ms = guess_ms + longer.work_ms + longer_still.work_ms
    assert given_ms == pytest.approx(output_ms(8 * EXPECTED_OUTPUT_TOKENS))
    end = the(Give, h.tokens(delta(5 * EXPECTED_OUTPUT_TOKENS + 1, finish=STOP)))
    assert given_ms + end.work_ms == pytest.approx(output_ms(5 * EXPECTED_OUTPUT_TOKENS + 1))
    assert h.do(Tick()) == []


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
    h = Harness()
    h.run()
    assert the(Fail, h.tokens(delta(0, finish=Finish(reason="error")))).error.code == "internal_error"
    h = Harness()
    h.run()
    h.tokens(delta(0, 5))
    again = h.tokens(delta(1, finish=Finish(reason="abort")))
    assert the(Place, again).request.output_token_ids == [5] and h.delivered() == [5], "which no client has asked for"


@pytest.mark.parametrize(("left", "error"), [(["d9"], WorkerLost), ([], Unavailable)])
def test_attempts_are_bounded(left: list[str], error: type[PenstockError]):
    h = Harness(max_attempts=2)
    h.run()
    h.do(*(WorkerUp(one) for one in left), WorkerUp("d2"))
    h.do(WorkerDown("d1"), Placed("a", 0, 1, placement("d2")))
    failure = the(Fail, h.do(WorkerDown("d2"))).error
    assert type(failure) is error and h.reserved() == {} and not h.core.choices


def test_a_request_that_its_workers_die_of_is_given_up_however_far_it_gets_each_time():
    h = Harness(max_attempts=3)
    h.run()
    for attempt in range(3):
        h.tokens(delta(attempt, 5, attempt=attempt))
        commands = h.do(WorkerDown(f"d{attempt + 1}"), WorkerUp(f"d{attempt + 2}"))
        if attempt < 2:
            h.do(Placed("a", 0, attempt + 1, placement(f"d{attempt + 2}")))
    assert type(the(Fail, commands).error) is Unavailable and h.core.retries == 2


def test_an_output_without_a_limit_goes_on_elsewhere():
    h = Harness()
    unlimited = msgspec.structs.replace(request(), sampling=SamplingParams(max_tokens=None))
    h.do(WorkerUp("d1"), Submitted(unlimited, "sink"), Placed("a", 0, 0, placement("d1")))
    h.tokens(delta(0, 5))
    assert the(Place, h.do(WorkerDown("d1"))).request.output_token_ids == [5]


def test_an_attempt_that_got_on_until_its_worker_left_has_not_failed():
    """It had no time to move: workers may be restarted one by one for longer than a stream has attempts."""
    h = Harness(max_attempts=2)
    h.run()
    h.do(WorkerUp("d2"))
    left = Finish(reason="error", code="unavailable", message="the worker shut down", retryable=True)
    for attempt in range(5):
        commands = h.tokens(delta(attempt, 5, attempt=attempt), delta(attempt + 1, attempt=attempt, finish=left))
        assert the(Place, commands).request.output_token_ids == [5] * (attempt + 1)
        h.do(Placed("a", 0, attempt + 1, placement("d2")))
    assert type(the(Place, h.tokens(delta(5, attempt=5, finish=left)))) is Place, "this one has said nothing"
    h.do(Placed("a", 0, 6, placement("d1")))
    assert type(the(Fail, h.tokens(delta(5, attempt=6, finish=left))).error) is Unavailable
    assert h.core.retries == 6 and h.reserved() == {}


def test_all_tokens_delivered_but_the_finish_lost():
    h = Harness()
    h.run(max_tokens=2)
    h.tokens(delta(0, 5), delta(1, 6))
    last = the(Deliver, h.do(WorkerDown("d1"))).delta
    assert last.token_ids == [] and last.index == 2 and last.finish == Finish(reason="length")
    assert not h.core.choices


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
