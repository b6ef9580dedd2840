"""Choices by their workers, and those that move away from a leaving one, as the dispatcher tells of them.

test_dispatch_faults.py compares what is kept of them with the choices themselves.
"""

from __future__ import annotations

from typing import Any, NoReturn

from penstock.common.errors import Unavailable
from penstock.common.messages import Finish, Move
from penstock.router.dispatch_events import (
    Place,
    Placed,
    Room,
    SendMove,
    Submitted,
    WorkerAtWork,
    WorkerDown,
    WorkerLeaving,
    WorkerStalled,
    WorkerUp,
)
from penstock.router.policy import Moving
from tests.router.dispatching import STOP, Harness, delta, placement, request, the, worker


def leaving(
    incarnation: str,
    pages: int = 1000,
    sequences: int = 8,
    routers: int = 1,
    to: str = "d2",
    context: int = 1000,
    others: tuple[str, ...] = (),
) -> WorkerLeaving:
    return WorkerLeaving(incarnation, to, Room(pages, 4, sequences, context, routers), frozenset(others))


def run_at(h: Harness, *names: str, decode: str = "d1") -> None:
    """Requests of three tokens each."""
    for name in names:
        h.do(Submitted(request(name), name), Placed(name, 0, 0, placement(decode)))


def moves(commands: list[Any]) -> list[str]:
    return [command.message.request_id for command in commands if isinstance(command, SendMove)]


class Unlisted(dict[Any, Any]):
    """Each can be found; all of them are too many to be looked through."""

    def values(self) -> NoReturn:
        raise AssertionError("all choices are looked through")

    items = __iter__ = values  # type: ignore[assignment]


def test_what_runs_at_a_leaving_worker_stays_there_until_another_has_room():
    h = Harness()
    h.do(WorkerUp("d1"), WorkerUp("d2"))
    run_at(h, "a", "b", "c")
    run_at(h, "d", decode="d2")
    h.tokens(delta(0, 5, 6, 7, of="b"))

    def asked(*events: WorkerLeaving) -> list[str]:
        return moves(h.do(*events))

    assert asked(leaving("d1", pages=0), leaving("d1", sequences=0)) == []
    assert asked(leaving("d1", pages=1)) == ["a"]
    assert asked(leaving("d1", pages=1)) == [], "what is on its way counts"
    h.tokens(delta(0, finish=Finish(reason="moved")))
    h.do(Placed("a", 0, 1, placement("d2")))
    assert asked(leaving("d1", pages=1)) == []
    h.tokens(delta(0, 9, attempt=1))
    assert asked(leaving("d1", pages=2)) == ["b"], "six tokens and the next one, in pages of four"
    assert asked(leaving("d1", pages=100, sequences=1)) == []
    assert asked(leaving("d1", pages=100, sequences=2)) == ["c"]


def test_who_is_on_the_way_to_one_worker_takes_no_room_at_another():
    h = Harness()
    h.do(WorkerUp("d1"), WorkerUp("d2"), WorkerUp("d3"))
    run_at(h, *"abcd")
    assert moves(h.do(leaving("d1", sequences=1), leaving("d1", sequences=1))) == ["a"]
    assert moves(h.do(leaving("d1", sequences=1, to="d3"))) == ["b"]
    place = the(Place, h.tokens(delta(0, finish=Finish(reason="moved", kept_tokens=4), of="b")))
    assert place.moving == Moving(worker("d1"), 4, "d3")
    assert moves(h.do(leaving("d1", sequences=1, to="d3"))) == [], "it is being placed"
    h.do(Placed("b", 0, 1, placement("d2")))  # d3 has gone meanwhile
    assert moves(h.do(leaving("d1", sequences=2))) == [], "a and b"
    assert moves(h.do(leaving("d1", sequences=1, to="d3"))) == ["c"]


def test_who_moves_again_is_on_the_way_to_where_it_moves_now():
    h = Harness()
    h.do(WorkerUp("d1"), WorkerUp("d2"), WorkerUp("d3"))
    run_at(h, "a", "b", "c")
    assert moves(h.do(leaving("d1", sequences=1))) == ["a"]
    h.tokens(delta(0, finish=Finish(reason="moved", kept_tokens=4)))
    h.do(Placed("a", 0, 1, placement("d2")))
    assert moves(h.do(leaving("d2", sequences=1, to="d3"))) == ["a"]
    assert moves(h.do(leaving("d1", sequences=1, to="d3"))) == []
    assert moves(h.do(leaving("d1", sequences=1))) == ["b"], "it takes no room at d2 any more"


def test_a_worker_that_is_heard_of_concerns_those_at_it_or_on_their_way_there():
    """Each is heard of several times a second, and there may be many thousands of choices."""
    h = Harness()
    h.do(WorkerUp("d1"), WorkerUp("d2"))
    run_at(h, "a", "b")
    run_at(h, "c", decode="d2")
    h.core.choices = Unlisted(h.core.choices)
    assert moves(h.do(leaving("d1", sequences=1))) == ["a"]
    assert moves(h.do(leaving("d1", sequences=1))) == []
    h.do(WorkerAtWork("d1"), WorkerStalled("d2", "no step"), WorkerDown("d1"))
    assert [command.request.request_id for command in h.all if isinstance(command, Place)] == [
        "a",
        "b",
        "c",
        "c",
        "a",
        "b",
    ]


def test_nothing_moves_to_where_it_does_not_fit():
    h = Harness()
    h.do(WorkerUp("d1"), WorkerUp("d2"))
    h.run()  # three tokens and a hundred
    assert moves(h.do(leaving("d1", context=102))) == []
    assert moves(h.do(leaving("d1", context=103))) == ["a"]


def test_nothing_moves_to_where_it_has_failed_if_it_may_go_elsewhere():
    h = Harness()
    h.do(WorkerUp("d1"), WorkerUp("d2"))
    h.run()
    h.do(WorkerDown("d1"), Placed("a", 0, 1, placement("d2")), WorkerUp("d1"))
    run_at(h, "b", decode="d2")
    assert moves(h.do(leaving("d2", to="d1", others=("d3",)))) == ["b"], "which has not failed there"
    assert moves(h.do(leaving("d2", to="d1", others=("d1",)))) == ["a"]


def test_of_several_routers_each_fills_its_share_of_the_room():
    h = Harness()
    h.do(WorkerUp("d1"), WorkerUp("d2"))
    run_at(h, *"abcdefg")
    assert moves(h.do(leaving("d1", sequences=6, routers=3))) == ["a", "b"]
    assert moves(h.do(leaving("d1", sequences=8, routers=3))) == [], "two are on their way"
    assert moves(h.do(leaving("d1", pages=11, sequences=99, routers=3))) == ["c"], "three pages of eleven"


def test_a_request_that_needs_more_than_a_share_goes_alone():
    h = Harness()
    h.do(WorkerUp("d1"), WorkerUp("d2"))
    run_at(h, "a", "b")
    h.tokens(delta(0, *range(20), of="b"))
    assert moves(h.do(leaving("d1", pages=40, sequences=1, routers=4))) == ["a"], "the whole room, but for one"
    h.tokens(delta(0, finish=Finish(reason="moved")))
    h.do(Placed("a", 0, 1, placement("d2")))
    h.tokens(delta(0, 9, attempt=1))
    assert moves(h.do(leaving("d1", pages=5, routers=4))) == []
    assert moves(h.do(leaving("d1", pages=6, routers=4))) == ["b"], "24 tokens with its next one"


def test_a_leaving_worker_gives_its_choices_up():
    """Behind its last token, not counted as a failed attempt, and the next attempt knows where it comes from."""
    h = Harness(max_attempts=1)
    h.run(prefill="p1")
    h.do(WorkerUp("d2"))
    moved = Finish(reason="moved", kept_tokens=4)
    assert h.do(leaving("p1")) == [], "it only computes the prompt there"
    assert the(SendMove, h.do(leaving("d1"))).message == Move(request_id="a", attempt=0)
    assert h.do(leaving("d1"), leaving("d9")) == []  # asked already; nothing runs there
    assert h.tokens(delta(1, 6)) == []
    assert h.tokens(delta(2, finish=moved)) == []  # the first token is still on its way from the prefill worker
    place = the(Place, h.tokens(delta(0, 5)))
    assert place.request.output_token_ids == [5, 6] and place.avoid == frozenset()
    assert place.moving == Moving(worker("d1"), 4, "d2")
    assert h.core.moves == 1 and h.core.retries == 0 and h.reserved() == {}
    h.do(Placed("a", 0, 1, placement("d2")))
    assert the(SendMove, h.do(leaving("d2", to="d1"))).message.attempt == 1  # and again
    h.tokens(delta(2, 7, attempt=1), delta(3, attempt=1, finish=moved))
    h.do(Placed("a", 0, 2, placement("d1")))
    h.tokens(delta(3, 8, attempt=2, finish=STOP))
    assert h.delivered() == [5, 6, 7, 8] and h.reserved() == {}
    h = Harness(max_attempts=2)
    h.run()
    h.do(WorkerUp("d2"), leaving("d1"))
    h.tokens(delta(0, finish=moved))
    h.do(Placed("a", 0, 1, placement("d2")))
    again = the(Place, h.do(WorkerDown("d2")))
    assert again.moving is None and again.avoid == {"d2"}  # a lost attempt has no pages to come with


def test_what_a_leaving_worker_refuses_still_has_its_pages_where_they_were():
    """Two that leave at once: nothing is computed again."""
    h = Harness(max_attempts=3)
    h.run()
    h.do(WorkerUp("d2"), leaving("d1"))
    h.tokens(delta(0, 5), delta(1, finish=Finish(reason="moved", kept_tokens=4)))
    h.do(Placed("a", 0, 1, placement("d2")))
    leaves = Finish(reason="error", code=Unavailable.code, message="leaves", retryable=True)
    again = the(Place, h.tokens(delta(1, attempt=1, finish=leaves)))
    assert again.moving == Moving(worker("d1"), 4, "") and again.avoid == {"d2"}
    assert h.core.whereabouts.on_the_way("d2") == []
    h.do(Placed("a", 0, 2, placement("d3")))
    h.tokens(delta(1, 6, attempt=2))
    once_more = the(Place, h.tokens(delta(2, attempt=2, finish=leaves)))
    assert once_more.moving is None, "they are given up where another worker has gone on"


def test_what_moves_before_its_worker_said_the_first_token_has_not_diverged():
    """The prefill worker has said it, and its hand-off failed: the decode worker knows nothing of it."""
    h = Harness(max_attempts=1)
    h.run(prefill="p1")
    h.do(WorkerUp("d2"))
    h.tokens(delta(0, 5))
    h.do(leaving("d1"))
    place = the(Place, h.tokens(delta(0, finish=Finish(reason="moved", kept_tokens=8))))
    assert place.moving == Moving(worker("d1"), 8, "d2") and place.request.output_token_ids == [5]
    assert h.core.divergences == 0
