"""Steps in flight: a random machine over an executor whose steps happen only when their results are read.

Until then others write into every page that is free: a page given up too early, or used too early, shows in the tokens,
in what a step reads, or in what the others wrote.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.common.messages import GenerateRequest, request_key
from penstock.common.sampling import SamplingParams
from penstock.engine.core import Engine
from penstock.engine.outputs import HANDED_OFF, Output
from penstock.engine.pages import PageManager
from penstock.engine.plan import SampledTokens, StepPlan, StepResult
from penstock.engine.policy import DecodePolicy, PrefillPolicy
from penstock.engine.scheduler import Scheduler, step_holder

PAGE = 4
BUDGET = 8  # of the engines below; the machine draws its own
FOREIGN = "foreign"


def next_token(tokens: list[int]) -> int:
    """Few values, so that stop tokens come often and prefixes repeat."""
    return (sum((i + 1) * token for i, token in enumerate(tokens)) * 7 + len(tokens)) % 97 % 11


def expected_tokens(source: GenerateRequest, max_model_len: int) -> list[int]:
    """The whole answer to a request that is alone."""
    tokens, output = list(source.prompt_token_ids), list[int]()
    while True:
        output.append(next_token(tokens))
        tokens.append(output[-1])
        if len(output) == source.sampling.max_tokens or len(tokens) == max_model_len:
            return output
        if output[-1] in source.sampling.stop_token_ids and len(output) >= source.sampling.min_tokens:
            return output


@dataclass
class LateStep:
    """A submitted step: its tokens are known, its reads and writes are done by `result`."""

    executor: LateExecutor
    value: StepResult
    writes: list[tuple[int, int, object]]  # page, slot, content
    reads: list[tuple[int, int, object]]

    def done(self) -> bool:
        return self.executor.ended.is_set()

    def wait(self) -> None:
        assert self.executor.ended.wait(60.0)

    def result(self) -> StepResult:
        slots = self.executor.slots
        assert self.executor.in_flight.pop(0) is self, "results are read in order"
        for page, slot, content in self.writes:
            slots[page, slot] = content
        for page, slot, content in self.reads:
            assert slots[page, slot] == content
        return self.value


class LateExecutor:
    """Keeps what a real executor keeps; a page's slots hold (position, tokens up to it)."""

    def __init__(self, run_ahead: int) -> None:
        self.run_ahead = run_ahead
        self.tokens: dict[str, list[int]] = {}
        self.tables: dict[str, list[int]] = {}
        self.slots: dict[tuple[int, int], object] = {}
        self.in_flight: list[LateStep] = []
        self.ended = threading.Event()  # what was submitted is done; while it is not set, the device is busy
        self.ended.set()

    def submit(self, plan: StepPlan) -> LateStep:
        assert plan.work
        for key in plan.ended:
            del self.tokens[key], self.tables[key]
        for start in plan.started:
            assert start.key not in self.tokens
            self.tokens[start.key], self.tables[start.key] = list(start.tokens), []
        sampled, writes, reads = [], [], []
        for work in plan.work:
            tokens, table = self.tokens[work.key], self.tables[work.key]
            table.extend(work.new_pages)
            end = work.start + work.num_tokens
            for position in range(end):
                place = table[position // PAGE], position % PAGE, (position, tuple(tokens[: position + 1]))
                (writes if position >= work.start else reads).append(place)
            assert work.samples == (end == len(tokens))
            if work.samples:
                tokens.append(next_token(tokens))
                sampled.append(SampledTokens(work.key, (tokens[-1],)))
        self.in_flight.append(LateStep(self, StepResult(plan.step, tuple(sampled)), writes, reads))
        return self.in_flight[-1]

    def close(self) -> None: ...


class Machine(RuleBasedStateMachine):
    """Requests come, stop, are aborted and preempted while up to two steps are in flight."""

    @initialize(
        run_ahead=st.integers(0, 2),
        num_pages=st.integers(6, 14),
        budget=st.integers(1, 24),
        seqs=st.integers(1, 5),
        caching=st.booleans(),
        gather=st.sampled_from([0.0, 0.5]),
    )
    def start(self, run_ahead: int, num_pages: int, budget: int, seqs: int, caching: bool, gather: float) -> None:
        scheduler = Scheduler(
            PageManager(num_pages, PAGE, caching=caching),
            DecodePolicy(mixed_chunk_tokens=max(1, budget // 2), gather_share=gather),
            max_num_seqs=seqs,
            max_num_batched_tokens=budget,
            max_model_len=num_pages * PAGE,
            hash_scope="test",
        )
        self.executor = LateExecutor(run_ahead)
        self.engine = Engine(scheduler, self.executor, lambda: 0.0)
        self.sources: dict[str, GenerateRequest] = {}  # open requests by key
        self.got: dict[str, list[int]] = {}
        self.foreign: dict[tuple[int, int], object] = {}
        self.count = 0

    def _collect(self, outputs: tuple[Output, ...]) -> None:
        for output in outputs:
            source, got = self.sources[output.key], self.got[output.key]
            assert output.request is source
            assert output.index == len(got)
            got += output.token_ids
            expected = expected_tokens(source, self.engine.scheduler.max_model_len)
            assert got == expected[: len(got)]
            assert (output.finish is not None) == (got == expected)
            if output.finish is not None:
                del self.sources[output.key]

    @rule(
        prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=18), min_size=1, max_size=5),
        max_tokens=st.integers(1, 16),
        stops=st.sets(st.integers(0, 10), max_size=2),
        min_tokens=st.integers(0, 1),
        claim=st.sampled_from(["", "promised", "landed"]),
        priority=st.integers(0, 1),
    )
    def add(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        stops: set[int],
        min_tokens: int,
        claim: str,
        priority: int,
    ) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=sorted(stops), min_tokens=min_tokens)
        for prompt in prompts:
            self.count += 1
            name = str(self.count)
            source = GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, priority=priority)
            self._add(source, claim)

    def _add(self, source: GenerateRequest, claim: str = "") -> None:
        """With pages, as far as there are any: promised, as admission does; or filled elsewhere, with a first token."""
        pages, key, prompt, computed = (
            self.engine.pages,
            request_key(source.request_id, 0, 0),
            source.prompt_token_ids,
            0,
        )
        wanted = pages.pages_for(len(prompt) + 1)
        first, *more = expected_tokens(source, self.engine.scheduler.max_model_len)
        if claim and wanted <= pages.num_available:
            pages.promise(key, wanted)
            if claim == "landed" and more:
                source, computed = msgspec.structs.replace(source, output_token_ids=[first]), len(prompt)
                table = pages.allocate(key, wanted)
                for position in range(computed):
                    content = position, tuple(prompt[: position + 1])
                    self.executor.slots[table[position // PAGE], position % PAGE] = content
        assert self.engine.add(source, computed=computed) == key
        self.sources[key], self.got[key] = source, list(source.output_token_ids)

    @precondition(lambda self: self.sources)
    @rule(data=st.data(), again=st.booleans())
    def abort(self, data: st.DataObject, again: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.sources)))
        source = self.sources.pop(key)
        assert self.engine.abort(source.request_id, source.choice, source.attempt)
        assert self.engine.pages.table(key) == []
        if again:  # the same key at once: nothing of the old request may reach the new one
            self._add(source)

    @rule()
    def look(self) -> None:
        """A step more is submitted, or none, and what is in flight is not done."""
        self.executor.ended.clear()
        output = self.engine.step_if_done()
        self.executor.ended.set()
        if output is not None:
            assert not output.outputs
        assert len(self.executor.in_flight) <= self.executor.run_ahead + 1
        self.engine.pages.check()

    @rule(steps=st.integers(1, 15))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._collect(self.engine.step().outputs)
            assert len(self.executor.in_flight) <= self.executor.run_ahead
            self.engine.pages.check()

    @rule(count=st.integers(1, 6))
    def others_take_free_pages(self, count: int) -> None:
        """As a hand-off does, which writes at any time."""
        pages = self.engine.pages
        for page in pages.allocate(FOREIGN, min(count, pages.num_available)):
            for slot in range(PAGE):
                self.foreign[page, slot] = self.executor.slots[page, slot] = object()

    @rule()
    def others_release(self) -> None:
        for page in self.engine.pages.release(FOREIGN):
            for slot in range(PAGE):
                del self.foreign[page, slot]

    @invariant()
    def written_pages_have_one_owner(self) -> None:
        self.engine.pages.check()
        pages, in_flight = self.engine.pages, self.executor.in_flight
        owners: dict[int, list[str]] = {}
        for holder in (FOREIGN, *self.sources, *(step_holder(step.value.step) for step in in_flight)):
            for page in pages.table(holder):
                owners.setdefault(page, []).append(holder)
        for step in in_flight:
            for page, _, _ in step.writes:
                assert len(owners[page]) == 1
                assert owners[page] != [FOREIGN]
        assert all(self.executor.slots[place] is content for place, content in self.foreign.items())

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.others_release()
        for _ in range(3000):
            if not self.engine.has_work():
                break
            self._collect(self.engine.step().outputs)
        assert not self.engine.has_work(), "no end"
        assert not self.sources
        assert self.engine.pages.num_held == self.engine.pages.num_promised == 0
        self.engine.pages.check()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def make_engine(run_ahead: int, num_pages: int = 16, *, prefill_only: bool = False) -> tuple[Engine, LateExecutor]:
    scheduler = Scheduler(
        PageManager(num_pages, PAGE),
        PrefillPolicy() if prefill_only else DecodePolicy(),
        max_num_seqs=4,
        max_num_batched_tokens=BUDGET,
        max_model_len=num_pages * PAGE,
        hash_scope="test",
    )
    executor = LateExecutor(run_ahead)
    return Engine(scheduler, executor, lambda: 0.0), executor


def source(name: str, prompt: list[int], **sampling: object) -> GenerateRequest:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=params)


def test_a_step_is_submitted_before_the_last_one_is_read() -> None:
    engine, executor = make_engine(1)
    engine.add(source("a", [1, 2], max_tokens=3))
    assert engine.step().outputs == ()  # submitted only
    assert (engine.steps, len(executor.in_flight)) == (1, 1)
    (first,) = engine.step().outputs
    assert (first.index, engine.steps, len(executor.in_flight)) == (0, 2, 1)
    (second,) = engine.step().outputs
    assert (second.index, engine.steps, len(executor.in_flight)) == (1, 3, 1)
    (third,) = engine.step().outputs  # its end by length was certain: no fourth step
    assert third.finish is not None
    assert (engine.steps, len(executor.in_flight), engine.has_work()) == (3, 0, False)


def test_a_stop_is_noticed_a_step_late_and_its_pages_wait_for_that_step() -> None:
    engine, executor = make_engine(1)
    prompt = [1, 2, 3]
    stop = next_token(prompt)
    engine.add(source("a", prompt, max_tokens=9, stop_token_ids=[stop]))
    engine.step()
    (output,) = engine.step().outputs
    assert output.finish is not None
    assert output.finish.reason == "stop"
    (late,) = executor.in_flight  # computes a second token, in position 3
    assert [slot for _, slot, _ in late.writes] == [3]
    assert engine.pages.table("a:0:0") == []
    assert engine.pages.table(step_holder(2)) == [late.writes[0][0]]
    assert engine.has_work()
    assert engine.step().outputs == ()
    assert engine.pages.num_held == 0
    assert not engine.has_work()


def test_nobody_is_preempted_while_a_step_is_in_flight() -> None:
    engine, executor = make_engine(1, num_pages=4)
    prompts = {"a": [1] * 4, "b": [2] * 4}
    for name, prompt in prompts.items():
        engine.add(source(name, prompt, max_tokens=8))
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    while engine.has_work():
        before, in_flight = engine.scheduler.counters.preemptions, len(executor.in_flight)
        for output in engine.step().outputs:
            tokens[output.request.request_id] += output.token_ids
        if engine.scheduler.counters.preemptions > before:
            assert in_flight == 0
    assert engine.scheduler.counters.preemptions > 0
    assert tokens == {name: expected_tokens(source(name, p, max_tokens=8), 16) for name, p in prompts.items()}


def test_a_prefill_worker_plans_nothing_behind_the_first_token() -> None:
    engine, _ = make_engine(1, prefill_only=True)
    engine.add(source("a", [1] * 10, max_tokens=5))
    outputs, progress = [], []
    while engine.has_work():
        step = engine.step()
        outputs += step.outputs
        progress += [p.computed for p in step.progress]
    assert engine.steps == 2
    assert progress == [8, 10]
    assert outputs[0].finish is HANDED_OFF
    assert len(engine.pages.table("a:0:0")) == 3
    engine.pages.release("a:0:0")
    assert engine.pages.num_held == 0


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_aborted_everywhere_settle_leaves_nothing(run_ahead: int) -> None:
    engine, executor = make_engine(run_ahead)
    for name in "abc":
        engine.add(source(name, [1] * 5, max_tokens=20))
    for _ in range(5):
        engine.step()
    for name in "abc":
        assert engine.abort(name, 0, 0)
    assert engine.has_work() == bool(run_ahead)
    engine.settle()
    assert not engine.has_work()
    assert executor.in_flight == []
    assert engine.pages.num_held == 0


def test_a_step_that_fails_gives_up_the_others() -> None:
    engine, executor = make_engine(1)
    engine.add(source("a", [1] * 5, max_tokens=20))
    engine.step()
    executor.submit = None  # type: ignore[assignment,method-assign]
    with pytest.raises(TypeError):
        engine.step()
    assert engine.abort("a", 0, 0)
    assert not engine.has_work()
    assert engine.pages.num_held == 0


def test_results_out_of_order_are_refused() -> None:
    engine, _ = make_engine(1)
    engine.add(source("a", [1] * 20))
    scheduler = engine.scheduler
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert first is not None
    assert second is not None
    with pytest.raises(ValueError, match="step 2 came before that of step 1"):
        scheduler.update(StepResult(second.step, ()), 0.0)


def test_a_key_used_again_at_once_gets_nothing_of_the_request_before() -> None:
    engine, executor = make_engine(2)
    request = source("a", [1, 2, 3], max_tokens=6)
    engine.add(request)
    for _ in range(4):
        engine.step()
    assert len(executor.in_flight) == 2
    engine.abort("a", 0, 0)
    engine.add(request)
    tokens: list[int] = []
    while engine.has_work():
        for output in engine.step().outputs:
            assert output.index == len(tokens)
            tokens += output.token_ids
    assert tokens == expected_tokens(request, 64)
    assert engine.pages.num_held == 0


class Speculating(LateExecutor):
    """Samples 0 to 3 tokens a sequence and step; none is told as an empty entry, or as no entry."""

    def submit(self, plan: StepPlan) -> LateStep:
        assert plan.num_tokens <= BUDGET
        step = super().submit(plan)
        sampled = []
        for item in step.value.sampled:
            tokens = self.tokens[item.key]
            count = (plan.step + len(tokens)) % 4
            for _ in range(count - 1):
                tokens.append(next_token(tokens))
            if count == 0:
                tokens.pop()
            sampled.append(SampledTokens(item.key, tuple(tokens[len(tokens) - count :])))
        step.value = StepResult(plan.step, tuple(sampled if plan.step % 2 else [s for s in sampled if s.token_ids]))
        return step


def test_a_step_may_sample_no_token_or_several() -> None:
    requests = [source(name, [1] * 5, max_tokens=20, stop_token_ids=[n]) for n, name in enumerate("abcdefgh")]
    engine, _ = make_engine(0, num_pages=20)
    engine.executor = Speculating(0)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for output in engine.step().outputs:
            assert output.token_ids
            assert output.index == len(tokens[output.request.request_id])
            tokens[output.request.request_id] += output.token_ids
        engine.pages.check()
    assert tokens == {request.request_id: expected_tokens(request, 80) for request in requests}
    assert engine.pages.num_held == 0
