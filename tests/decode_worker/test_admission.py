"""Admission: order, promises, deadlines."""

from __future__ import annotations

from penstock.common.messages import GenerateRequest
from penstock.common.page_hash import page_hashes, root_hash
from penstock.common.sampling import SamplingParams
from penstock.decode_worker.admission import Admission, Entry
from penstock.engine.pages import PageManager


def make_entry(
    name: str,
    num_tokens: int,
    arrived: float = 0.0,
    timeout_s: float = 60.0,
    priority: int = 0,
    attempt: int = 0,
    output: tuple[int, ...] = (),
) -> Entry:
    tokens = list(range(num_tokens))
    request = GenerateRequest(
        request_id=name,
        prompt_token_ids=tokens,
        output_token_ids=list(output),
        sampling=SamplingParams(),
        queue_timeout_s=timeout_s,
        priority=priority,
        attempt=attempt,
    )
    return Entry(b"router/1", request, None, arrived, list(page_hashes(root_hash("test"), tokens, 4)))


def test_in_order_and_only_what_has_room() -> None:
    pages = PageManager(6, 4)
    admission = Admission(pages, max_admitted=8)
    for name, tokens in (("a", 7), ("big", 16), ("small", 1)):
        admission.submit(make_entry(name, tokens))
    assert [e.request.request_id for e in admission.admit(0.0, 0, preempted=False)] == ["a"]  # 8 tokens: 2 pages
    assert pages.num_promised == 2
    assert list(admission.admit(0.0, 1, preempted=False)) == []  # "big" needs 5; "small" does not pass it
    pages.end_promise("a:0:0")
    assert [e.request.request_id for e in admission.admit(0.0, 0, preempted=False)] == ["big", "small"]
    assert pages.num_promised == 6
    assert len(admission) == 0


def test_a_cached_prefix_is_held_and_not_promised_again() -> None:
    pages = PageManager(8, 4)
    entry = make_entry("a", 8)
    for page, name in zip(pages.allocate("old", 2), entry.hashes, strict=True):
        pages.name(page, name)
    pages.release("old")
    admission = Admission(pages, max_admitted=8)
    admission.submit(entry)
    assert list(admission.admit(5.0, 0, preempted=False)) == [entry]
    assert entry.held_tokens == 4  # the page of the last token is computed anew: its logits are needed
    assert entry.admitted == 5.0
    assert len(pages.table(entry.key)) == 1
    assert pages.num_promised == 2


def test_what_goes_on_behind_an_earlier_attempt_is_promised_room_for_its_output_too() -> None:
    pages = PageManager(4, 4)
    entry = make_entry("a", 3, attempt=1, output=(7,) * 9)
    admission = Admission(pages, max_admitted=8)
    admission.submit(entry)
    assert admission.queued_tokens == 12
    assert list(admission.admit(0.0, 0, preempted=False)) == [entry]
    assert pages.num_promised == 4 and admission.queued_tokens == 0  # 12 tokens and the next one


def test_nobody_is_admitted_past_the_limit_or_a_preempted_sequence() -> None:
    admission = Admission(PageManager(100, 4), max_admitted=2)
    for i in range(4):
        admission.submit(make_entry(str(i), 3))
    assert list(admission.admit(0.0, 0, preempted=True)) == []
    assert len(list(admission.admit(0.0, 1, preempted=False))) == 1
    assert admission.queued_tokens == 9


def test_deadlines_and_cancelling() -> None:
    admission = Admission(PageManager(1, 4), max_admitted=2)
    admission.submit(make_entry("late", 20, arrived=0.0, timeout_s=5.0))
    admission.submit(make_entry("patient", 20, arrived=0.0))
    assert admission.expired(5.0) == []
    assert [e.request.request_id for e in admission.expired(5.1)] == ["late"]
    assert admission.cancel("late:0:0") is None
    assert admission.cancel("patient:0:0") is not None
    assert len(admission) == 0


def test_the_lowest_priority_first_then_in_order_of_arrival() -> None:
    admission = Admission(PageManager(100, 4), max_admitted=9)
    for name, priority in (("d", 0), ("f", 5), ("e", -1), ("b", 0), ("c", -1), ("a", 5)):
        admission.submit(make_entry(name, 3, priority=priority))
    assert admission.cancel("b:0:0") is not None
    assert "".join(e.request.request_id for e in admission.entries()) == "ecdfa"
    assert "".join(e.request.request_id for e in admission.admit(0.0, 0, preempted=False)) == "ecdfa"
    assert admission.queued_tokens == 0


def test_who_comes_from_another_worker_goes_before_who_is_new() -> None:
    admission = Admission(PageManager(100, 4), max_admitted=9)
    for name, attempt, priority in (("a", 0, 0), ("b", 2, 0), ("c", 1, 0), ("d", 0, -1), ("e", 1, 5), ("f", 0, 5)):
        admission.submit(make_entry(name, 3, priority=priority, attempt=attempt))
    assert admission.cancel("b:0:2") is not None
    assert "".join(e.request.request_id for e in admission.admit(0.0, 0, preempted=False)) == "dcaef"
    assert admission.queued_tokens == 0


def test_who_waits_for_a_sibling_lets_others_pass() -> None:
    """One begins before the next is looked at, so that it can be what the next ones wait for."""
    admission = Admission(PageManager(100, 4), max_admitted=9)
    for name, priority in (("a1", 0), ("a2", 0), ("b1", 0), ("a3", 0), ("b2", -1)):
        admission.submit(make_entry(name, 3, priority=priority))
    reading: set[str] = set()

    def names() -> list[str]:
        found = []
        for entry in admission.admit(0.0, 0, preempted=False, waits=lambda e: e.request.request_id[0] in reading):
            found.append(entry.request.request_id)
            reading.add(found[-1][0])
        return found

    assert names() == ["b2", "a1"] and len(admission) == 3
    reading.remove("b")
    assert names() == ["b1"]
    reading.clear()
    assert names() == ["a2"] and names() == []
    reading.clear()
    assert names() == ["a3"] and len(admission) == 0


def test_who_waits_for_something_else_has_not_waited_for_room() -> None:
    admission = Admission(PageManager(8, 4), max_admitted=8)
    entry = make_entry("sibling", 3, arrived=0.0, timeout_s=10.0)
    admission.submit(entry)
    for now in (1.0, 12.0):
        assert list(admission.admit(now, 0, preempted=False, waits=lambda _: True)) == []
        assert admission.expired(now) == []
    assert list(admission.admit(13.0, 8, preempted=False)) == []  # now it wants room, and there is none
    assert admission.expired(21.0) == []
    assert admission.expired(23.0) == [entry]
