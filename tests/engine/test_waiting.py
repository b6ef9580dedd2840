"""The queue in front of the batch: who comes first, who holds a claim, who has waited too long."""

from __future__ import annotations

from penstock.common.messages import GenerateRequest
from penstock.common.sampling import SamplingParams
from penstock.engine.request import Request
from penstock.engine.waiting import WaitingQueue


def waiting(name: str, num_tokens: int = 3, priority: int = 0, arrived: float = 0.0) -> Request:
    tokens = list(range(num_tokens))
    source = GenerateRequest(
        request_id=name, prompt_token_ids=tokens, sampling=SamplingParams(), priority=priority, queue_timeout_s=10.0
    )
    return Request(source, arrived)


def names(queue: WaitingQueue) -> str:
    return "".join(request.source.request_id for request in queue)


def test_what_was_preempted_comes_before_its_equals_and_behind_those_more_urgent() -> None:
    queue = WaitingQueue()
    for name, priority in (("d", 0), ("a", 0), ("z", 5), ("c", -1), ("b", -1)):
        queue.append(waiting(name, priority=priority), has_claim=False)
    assert names(queue) == "cbdaz"
    for name, priority in (("1", 0), ("2", 0), ("3", 5), ("4", -1), ("5", 9)):
        queue.put_back(waiting(name, priority=priority))
    assert names(queue) == "4cb21da3z5"


def test_a_claim_counts_as_long_as_its_request_waits_with_it() -> None:
    """One that is preempted later has lost it, and must not pass others for its sake."""
    queue, request = WaitingQueue(), waiting("a")
    queue.append(waiting("other"), has_claim=False)
    queue.append(request, has_claim=True)
    assert queue.num_claims == 1
    queue.remove(request)
    assert queue.num_claims == 0 and not request.has_claim
    queue.put_back(request)
    queue.remove(request)
    assert queue.num_claims == 0 and names(queue) == "other"


def test_who_was_planned_once_waits_as_long_as_it_takes() -> None:
    queue = WaitingQueue()
    late, later, begun = waiting("late"), waiting("later", arrived=5.0), waiting("begun")
    begun.first_planned = 1.0
    for request in (late, later, begun):
        queue.append(request, has_claim=False)
    assert queue.expired(10.0) == []
    assert queue.expired(10.1) == [late]
    assert queue.expired(15.1) == [late, later]


def test_who_has_room_is_counted_from_the_front() -> None:
    queue = WaitingQueue()
    for name, num_tokens in (("a", 4), ("b", 5), ("c", 1)):
        queue.append(waiting(name, num_tokens), has_claim=False)

    def with_room(slots: int = 9, pages: int = 9, num_tokens: int = 99) -> tuple[int, int]:
        return queue.with_room(slots=slots, pages=pages, page_size=4, num_tokens=num_tokens)

    assert with_room() == (3, 10)
    assert [with_room(slots=slots) for slots in (0, 2)] == [(0, 0), (2, 9)]
    assert [with_room(pages=pages) for pages in (0, 1, 2, 3, 4)] == [(0, 0), (1, 4), (1, 4), (2, 9), (3, 10)]
    assert [with_room(num_tokens=tokens) for tokens in (4, 5, 9, 10)] == [(1, 4), (2, 9), (2, 9), (3, 10)]
