"""The scheduler with a fake executor: no model, no tensors, tokens that are a function of the sequence."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.common.messages import Finish, GenerateRequest
from penstock.common.page_hash import chained, page_hashes, root_hash
from penstock.common.sampling import SamplingParams
from penstock.engine.outputs import HANDED_OFF, Output
from penstock.engine.pages import PageManager
from penstock.engine.plan import SampledTokens, StepPlan, StepResult
from penstock.engine.policy import BatchPolicy, DecodePolicy, PrefillPolicy
from penstock.engine.request import Request
from penstock.engine.scheduler import Scheduler

PAGE = 4


class FakeExecutor:
    """Keeps what a real executor keeps, checks that plans are consistent, and "samples" a hash of the sequence.

    It also writes every token into its page slot, so that a page handed out twice, or a token never computed, shows.
    """

    def __init__(self, num_pages: int) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.tables: dict[str, list[int]] = {}
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}  # (page, slot) -> (position, token)

    def run(self, plan: StepPlan) -> StepResult:
        for key in plan.ended:
            self.tokens.pop(key, None)
            self.tables.pop(key, None)
        for start in plan.started:
            assert start.key not in self.tokens
            self.tokens[start.key], self.tables[start.key] = list(start.tokens), []
        sampled = []
        for work in plan.work:
            tokens, table = self.tokens[work.key], self.tables[work.key]
            table.extend(work.new_pages)
            assert work.num_tokens > 0
            end = work.start + work.num_tokens
            assert PAGE * (len(table) - 1) < max(end, len(tokens)), "more pages than it needs"
            for position in range(work.start, end):
                self.slots[table[position // PAGE], position % PAGE] = position, tokens[position]
            for position in range(end):  # everything that attention would read
                assert self.slots[table[position // PAGE], position % PAGE] == (position, tokens[position])
            assert work.samples == (end == len(tokens))
            if work.samples:
                tokens.append(next_token(tokens))
                sampled.append(SampledTokens(work.key, (tokens[-1],)))
        return StepResult(plan.step, tuple(sampled))


class Submitting:
    """`FakeExecutor` behind the executor's interface."""

    def __init__(self, num_pages: int, run_ahead: int) -> None:
        self.run_ahead = run_ahead
        self.fake = FakeExecutor(num_pages)
        self.busy = False  # what is submitted does not end

    def submit(self, plan: StepPlan) -> Any:
        result: StepResult = self.fake.run(plan)
        return SimpleNamespace(done=lambda: not self.busy, result=lambda: result)

    def close(self) -> None: ...


def next_token(tokens: list[int]) -> int:
    return (sum((i + 1) * token for i, token in enumerate(tokens)) * 7 + len(tokens)) % 97


def oracle(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def make_scheduler(
    num_pages: int = 64, budget: int = 16, seqs: int = 8, policy: BatchPolicy | None = None, caching: bool = True
) -> Scheduler:
    return Scheduler(
        PageManager(num_pages, PAGE, caching=caching),
        policy or DecodePolicy(),
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=num_pages * PAGE,
        hash_scope="test",
    )


def make_request(name: str, prompt: list[int], max_tokens: int = 5, **sampling: object) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=params)


def drain(scheduler: Scheduler, executor: FakeExecutor, limit: int = 10_000) -> list[Output]:
    outputs: list[Output] = []
    for now in range(limit):
        if not scheduler.has_work():
            return outputs
        plan = scheduler.plan(float(now))
        if plan is not None:
            assert plan.num_tokens <= scheduler.max_num_batched_tokens
            outputs += scheduler.update(executor.run(plan), float(now)).outputs
        scheduler.pages.check()
    raise AssertionError("no end")


def joined(outputs: list[Output]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for output in outputs:
        got = tokens.setdefault(output.request.request_id, [])
        assert output.index == len(got)
        got += output.token_ids
    return tokens


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    prompts=PROMPTS,
    num_pages=st.integers(10, 40),
    budget=st.integers(1, 20),
    seqs=st.integers(1, 6),
    caching=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_load_gives_every_request_its_tokens(
    prompts: list[list[int]], num_pages: int, budget: int, seqs: int, caching: bool, seed: int
) -> None:
    """Few pages, tiny budgets, shared prefixes, aborts in between: tokens as if each request were alone."""
    scheduler = make_scheduler(num_pages, budget, seqs, caching=caching)
    executor = FakeExecutor(num_pages)
    chooser = random.Random(seed)
    outputs: list[Output] = []
    aborted: set[str] = set()
    waiting = list(enumerate(prompts))
    for now in range(10_000):
        if not waiting and not scheduler.has_work():
            break
        if waiting and chooser.random() < 0.5:
            i, prompt = waiting.pop(0)
            scheduler.add(Request(make_request(str(i), prompt, 1 + i % 7), float(now)))
        victims = [r.key for r in (*scheduler.running, *scheduler.waiting)]
        if victims and chooser.random() < 0.05:
            request = scheduler.abort(chooser.choice(victims))
            assert request is not None
            aborted.add(request.source.request_id)
        plan = scheduler.plan(float(now))
        if plan is not None:
            assert len(scheduler.running) <= seqs and len(plan.work) <= seqs and plan.num_tokens <= budget
            outputs += scheduler.update(executor.run(plan), float(now)).outputs
        scheduler.pages.check()
    else:
        raise AssertionError("no end")
    tokens = joined(outputs)
    for i, prompt in enumerate(prompts):
        if str(i) not in aborted:
            assert tokens[str(i)] == oracle(prompt, 1 + i % 7)
    assert scheduler.pages.num_held == scheduler.pages.num_promised == 0


def test_two_steps_in_flight_give_the_same_tokens() -> None:
    """`plan` before the last `update`: what was sampled is pending, and nothing is lost when a request ends late."""
    scheduler = make_scheduler()
    executor = FakeExecutor(64)
    prompts = {"a": [1, 2, 3], "b": [2] * 9, "c": [1]}
    for name, prompt in prompts.items():
        scheduler.add(Request(make_request(name, prompt), 0.0))
    outputs: list[Output] = []
    in_flight: list[StepResult] = []
    while scheduler.has_work() or in_flight:
        plan = scheduler.plan(0.0)
        if plan is not None:
            in_flight.append(executor.run(plan))
        if len(in_flight) == 2 or plan is None:
            outputs += scheduler.update(in_flight.pop(0), 0.0).outputs
        scheduler.pages.check()
    assert joined(outputs) == {name: oracle(prompt, 5) for name, prompt in prompts.items()}
    assert scheduler.pages.num_held == 0


def test_decodes_come_before_prompts_and_the_budget_holds() -> None:
    scheduler = make_scheduler(budget=8)
    executor = FakeExecutor(64)
    scheduler.add(Request(make_request("a", [1], 50), 0.0))
    first = scheduler.plan(0.0)
    assert first is not None
    scheduler.update(executor.run(first), 0.0)
    scheduler.add(Request(make_request("long", [2] * 30), 0.0))
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert [(w.key, w.num_tokens) for w in plan.work] == [("a:0:0", 1), ("long:0:0", 2)]  # 2 = 8 // 4


def test_a_prefill_worker_keeps_the_pages_of_what_it_hands_off() -> None:
    scheduler = make_scheduler(policy=PrefillPolicy())
    scheduler.add(Request(make_request("a", [1] * 10), 0.0))
    (output,) = drain(scheduler, FakeExecutor(64))
    assert output.finish is HANDED_OFF
    assert output.token_ids == tuple(oracle([1] * 10, 1))
    assert len(scheduler.pages.table("a:0:0")) == 3
    scheduler.pages.release("a:0:0")
    assert scheduler.pages.num_held == 0


def test_landed_pages_are_used_and_only_the_rest_is_computed() -> None:
    scheduler = make_scheduler()
    executor = FakeExecutor(64)
    source = make_request("a", [1] * 10)
    request = Request(source, 0.0)
    for position in range(8):
        page = scheduler.pages.table(request.key) or scheduler.pages.allocate(request.key, 2)
        executor.slots[page[position // PAGE], position % PAGE] = position, 1
    scheduler.add(request, computed=8)
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert [(w.start, w.num_tokens, len(w.new_pages)) for w in plan.work] == [(8, 2, 3)]
    outputs = [*scheduler.update(executor.run(plan), 0.0).outputs, *drain(scheduler, executor)]
    assert joined(outputs) == {"a": oracle([1] * 10, 5)}


def test_what_has_landed_decodes_in_the_next_step_beside_whose_prompt_ever() -> None:
    """Behind the chunks of a long prompt, its client would wait for its second token until the last of them."""
    scheduler = make_scheduler(policy=DecodePolicy(mixed_chunk_tokens=2))
    executor = FakeExecutor(64)
    scheduler.add(Request(make_request("decodes", [3, 4], 9), 0.0))
    plan = scheduler.plan(0.0)
    assert plan is not None
    scheduler.update(executor.run(plan), 0.0)
    for name in ("under way", "waits"):
        scheduler.add(Request(make_request(name, [1] * 10), 0.0))
    plan = scheduler.plan(0.0)
    assert plan is not None and [w.num_tokens for w in plan.work] == [1, 2]
    scheduler.update(executor.run(plan), 0.0)

    landed = Request(make_request("landed", [5] * 6), 0.0)
    landed.tokens.append(oracle([5] * 6, 1)[0])  # its first token, which the prefill worker sampled
    pages = scheduler.pages.allocate(landed.key, 2)
    for position in range(6):
        executor.slots[pages[position // PAGE], position % PAGE] = position, 5
    scheduler.add(landed, computed=6)
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert [(w.key, w.num_tokens, w.samples) for w in plan.work] == [
        ("decodes:0:0", 1, True),
        ("landed:0:0", 1, True),
        ("under way:0:0", 2, False),
    ], "before the prompt's chunk, as the executor wants what decodes"
    scheduler.update(executor.run(plan), 0.0)
    assert drain(scheduler, executor)
    assert landed.tokens == [5] * 6 + oracle([5] * 6, 5)


def test_stop_tokens_lengths_and_min_tokens() -> None:
    prompt = [1, 2, 3]
    expected = oracle(prompt, 6)
    cases = [
        ({"stop_token_ids": [expected[2]]}, "stop", expected[2], 3),
        ({"stop_token_ids": [expected[2]], "min_tokens": 4}, "length", None, 5),
        ({}, "length", None, 5),
    ]
    for sampling, reason, stop_reason, count in cases:
        scheduler = make_scheduler()
        scheduler.add(Request(make_request("a", prompt, 5, **sampling), 0.0))
        outputs = drain(scheduler, FakeExecutor(64))
        assert joined(outputs) == {"a": expected[:count]}
        finish = outputs[-1].finish
        assert finish is not None
        assert (finish.reason, finish.stop_reason) == (reason, stop_reason)


def test_the_context_ends_a_request() -> None:
    scheduler = make_scheduler(num_pages=3)
    scheduler.add(Request(make_request("a", [1] * 8, 50), 0.0))
    outputs = drain(scheduler, FakeExecutor(3))
    assert len(joined(outputs)["a"]) == 4
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.reason == "length"


def test_a_promised_request_passes_a_preempted_one_that_waits_for_its_pages() -> None:
    scheduler = make_scheduler(num_pages=6)
    executor = FakeExecutor(6)
    scheduler.add(Request(make_request("old", [1] * 14, 8), 0.0))
    plan = scheduler.plan(0.0)
    assert plan is not None
    scheduler.update(executor.run(plan), 0.0)
    newcomer = Request(make_request("new", [2] * 6, 2), 0.0)
    scheduler.pages.promise(newcomer.key, 2)  # nothing is left for the other one to grow
    while not scheduler.waiting:
        plan = scheduler.plan(0.0)
        if plan is not None:  # else it has just been preempted, and nothing is left to compute
            scheduler.update(executor.run(plan), 0.0)
    scheduler.add(newcomer)
    tokens = {output.request.request_id: output.token_ids for output in drain(scheduler, executor)}
    assert tokens["new"] == (oracle([2] * 6, 2)[1],)
    assert not scheduler.has_work()


def test_a_promise_also_covers_pages_that_turn_up_in_the_cache() -> None:
    scheduler = make_scheduler(num_pages=2)
    executor = FakeExecutor(2)
    scheduler.add(Request(make_request("first", [1] * 4, 1), 0.0))
    drain(scheduler, executor)
    late = Request(make_request("late", [1] * 4 + [2], 2), 0.0)
    scheduler.pages.promise(late.key, 2)  # all there is, before anybody looked into the cache
    scheduler.add(late)
    assert joined(drain(scheduler, executor)) == {"late": oracle([1] * 4 + [2], 2)}
    assert scheduler.counters.prefix_hits == 4
    assert scheduler.pages.num_held == scheduler.pages.num_promised == 0


def test_a_prompt_that_waits_for_pages_is_not_passed_by_smaller_ones() -> None:
    """Else a long prompt would wait for as long as short ones come; whose pages are promised takes none from it."""
    scheduler = make_scheduler(num_pages=6, budget=64)
    executor = FakeExecutor(6)
    started: list[str] = []
    scheduler.pages.promise("promised:0:0", 1)
    for name, length in (("first", 10), ("long", 17), ("short", 2), ("promised", 2)):
        scheduler.add(Request(make_request(name, [1] * length, 2), 0.0))
    while scheduler.has_work():
        plan = scheduler.plan(0.0)
        assert plan is not None
        started += [start.key.partition(":")[0] for start in plan.started]
        scheduler.update(executor.run(plan), 0.0)
    assert started == ["first", "promised", "long", "short"]


@pytest.mark.parametrize(("length", "cached"), [(8, 4), (9, 8)])
def test_of_a_prompt_that_is_cached_whole_the_last_token_is_computed(length: int, cached: int) -> None:
    scheduler, executor = make_scheduler(), FakeExecutor(64)
    prompt = [1, 2, 0, 1, 2, 2, 1, 0, 1][:length]
    for name in ("first", "again"):
        scheduler.add(Request(make_request(name, prompt), 0.0))
        assert joined(drain(scheduler, executor)) == {name: oracle(prompt, 5)}
    assert scheduler.counters.prefix_hits == cached
    names = list(page_hashes(root_hash("test"), prompt + oracle(prompt, 4), PAGE))
    assert scheduler.pages.drain_events() == (chained(names), []), "each is told with the page before it"


def test_what_can_never_be_computed_is_refused() -> None:
    scheduler = make_scheduler(num_pages=2)
    scheduler.add(Request(make_request("a", [1] * 7), 0.0))
    for name, length in (("a", 3), ("b", 8)):
        with pytest.raises(ValueError, match="exists already" if name == "a" else "no room for output"):
            scheduler.add(Request(make_request(name, [1] * length), 0.0))
    assert joined(drain(scheduler, FakeExecutor(2))) == {"a": oracle([1] * 7, 1)}
    with pytest.raises(ValueError, match="cannot hold"):
        Scheduler(
            PageManager(2, PAGE),
            DecodePolicy(),
            max_num_seqs=1,
            max_num_batched_tokens=8,
            max_model_len=9,
            hash_scope="test",
        )


def test_the_lowest_priority_first_and_the_highest_preempted() -> None:
    """Two at a time; a preempted sequence comes before its equals, and after those more urgent."""
    scheduler = make_scheduler(num_pages=6, seqs=2, caching=False)
    executor = FakeExecutor(6)
    for name, priority in (("late", 2), ("first", 0), ("urgent", -5), ("second", 0)):
        source = GenerateRequest(
            request_id=name,
            prompt_token_ids=[1, 2, 3],
            sampling=SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
            priority=priority,
        )
        scheduler.add(Request(source, 0.0))
    started: list[str] = []
    ended: list[str] = []
    while scheduler.has_work():
        plan = scheduler.plan(0.0)
        assert plan is not None
        started += [start.key.partition(":")[0] for start in plan.started]
        for output in scheduler.update(executor.run(plan), 0.0).outputs:
            if output.finish is not None:
                ended.append(output.request.request_id)
        scheduler.pages.check()
    assert started[:2] == ["urgent", "first"] and "first" in started[2:]
    assert ended == ["urgent", "first", "second", "late"]
    assert scheduler.counters.preemptions > 0 and scheduler.pages.num_held == 0


@dataclass
class EndsAnyTime:
    """A form of which a thread finds out, just before a step is planned, that nothing may follow."""

    ready: bool = True
    mask: bytes = b""

    def allows(self, token: int) -> bool:
        return bool(self.mask)


@pytest.mark.parametrize("runs", [False, True])
def test_no_step_is_planned_for_an_output_that_has_ended_but_has_not_been_told_so(runs: bool) -> None:
    scheduler, executor = make_scheduler(), FakeExecutor(64)
    request = Request(make_request("r", [1, 2, 3]), 0.0)
    form = request.constraint = EndsAnyTime(mask=b"\xff" if runs else b"")
    scheduler.add(request)
    if runs:
        plan = scheduler.plan(0.0)
        assert plan is not None and plan.work[0].mask == b"\xff"
        scheduler.update(executor.run(plan), 0.0)
        form.mask = b""
    assert scheduler.plan(1.0) is None
    scheduler.end(request, Finish(reason="stop"), 1.0)
    assert scheduler.pages.num_held == 0 and not scheduler.has_work()
