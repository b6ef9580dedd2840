"""The offline `LLM` in its process: interrupts, errors, threads and what is imported leave nothing behind."""

from __future__ import annotations

import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from penstock import LLM, RequestOutput, SamplingParams
from penstock.engine.plan import Executor, StepHandle, StepPlan
from penstock.interrupt import HeldInterrupt
from tests.penstock.offline import GREEDY, OPTIONS, TEXT, assert_empty, run, tokens
from tests.tiny_models import random_prompts

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.parametrize("step", [1, 3, 9])
def test_ctrl_c_in_the_middle_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    prompts = random_prompts([40, 5, 60], seed=6)
    expected = tokens(run(llm, prompts))
    engine, submit = llm._built.engine, llm._built.engine.executor.submit
    before, begun = engine.steps, 0

    def interrupted(plan: StepPlan) -> StepHandle:
        nonlocal begun
        begun += 1
        if begun == step:
            signal.raise_signal(signal.SIGINT)
        return submit(plan)

    monkeypatch.setattr(engine.executor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llm, prompts)
    assert engine.steps - before == begun == step  # the step was finished, and none came after it
    assert_empty(llm)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert tokens(run(llm, prompts)) == expected


def test_an_error_in_the_middle_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(llm._built.engine.executor, "submit", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(llm, [TEXT, "The river"])
    assert_empty(llm)
    assert len(tokens(run(llm, TEXT))[0]) == 12


def test_another_thread_may_generate(llm: LLM) -> None:
    answers: list[list[RequestOutput]] = []
    thread = threading.Thread(target=lambda: answers.append(run(llm, TEXT)))
    thread.start()
    thread.join()
    assert tokens(answers[0]) == tokens(run(llm, TEXT))


def test_threads_generate_one_after_the_other(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts([40, 5, 60], seed=6)
    expected = tokens(run(llm, prompts))
    submit, steps, answers = llm.engine.executor.submit, [], []
    ready = threading.Barrier(4)

    def noting(plan: StepPlan) -> StepHandle:
        steps.append(threading.get_ident())
        time.sleep(0)  # whoever else could step would now
        return submit(plan)

    def program() -> None:
        ready.wait()
        answers.append(tokens(run(llm, prompts)))

    monkeypatch.setattr(llm.engine.executor, "submit", noting)
    threads = [threading.Thread(target=program) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 4
    assert len(list(itertools.groupby(steps))) == 4


def test_a_close_waits_for_what_another_thread_generates(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(model), **OPTIONS)
    submit, close, order = llm.engine.executor.submit, llm.engine.executor.close, []
    closing = threading.Thread(target=llm.close)

    def begun(plan: StepPlan) -> StepHandle:
        if not order:
            closing.start()
        order.append("step")
        return submit(plan)

    monkeypatch.setattr(llm.engine.executor, "submit", begun)
    monkeypatch.setattr(llm.engine.executor, "close", lambda: (order.append("close"), close()))
    assert len(tokens(run(llm, TEXT))[0]) == 12
    closing.join()
    assert order.index("close") == len(order) - 1 >= 12
    with pytest.raises(ValueError, match="it is closed"):
        run(llm, TEXT)
    llm.close()
    assert order.count("close") == 1


def test_a_signals_handler_may_close(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(model), **OPTIONS)

    def handler(plan: object) -> None:
        llm.close()
        raise SystemExit(3)

    monkeypatch.setattr(llm.engine.executor, "submit", handler)
    with pytest.raises(SystemExit):
        run(llm, TEXT)


def test_a_held_interrupt_goes_to_the_programs_own_handler() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with HeldInterrupt() as held:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert seen == []
            held.deliver()
            assert seen == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)
        assert len(seen) == 2
        signal.raise_signal(signal.SIGINT)
        assert len(seen) == 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_old_objects_are_left_alone_while_it_generates(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, frozen = llm.engine.executor.submit, []

    def noting(plan: StepPlan) -> StepHandle:
        frozen.append(gc.get_freeze_count())
        return submit(plan)

    monkeypatch.setattr(llm.engine.executor, "submit", noting)
    assert gc.get_freeze_count() == 0
    run(llm, TEXT)
    assert min(frozen) > 10000 and gc.get_freeze_count() == 0
    gc.freeze()
    try:
        run(llm, TEXT)
        assert gc.get_freeze_count() > 0  # the program's own doing
    finally:
        gc.unfreeze()


class _Late:
    """An executor that computes at once and tells a step late, as one on a GPU does."""

    run_ahead = 1

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, plan: StepPlan) -> StepHandle:
        return self._executor.submit(plan)

    def close(self) -> None:
        self._executor.close()


def test_steps_in_flight_at_the_end_leave_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop is noticed while the next step computes; the next call must not see anything of it."""
    prompts = random_prompts([3, 21, 40], seed=5)
    plain = tokens(run(llm, prompts))
    stops = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[ids[4]]) for ids in plain]
    text = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=[run(llm, TEXT)[0].outputs[0].text[3:5]])
    expected = [tokens(run(llm, prompts, params)) for params in (GREEDY, stops)] + [tokens(run(llm, TEXT, text))]
    monkeypatch.setattr(llm.engine, "executor", _Late(llm.engine.executor))
    for wanted, params in zip(expected, (GREEDY, stops), strict=False):
        assert tokens(run(llm, prompts, params)) == wanted
        assert_empty(llm)
    assert tokens(run(llm, TEXT, text)) == expected[2]
    assert_empty(llm)


def test_importing_penstock_imports_no_torch() -> None:
    program = (
        "import sys, penstock; assert 'torch' not in sys.modules; from penstock import SamplingParams;"
        "assert 'torch' not in sys.modules; from penstock import LLM; assert 'torch' in sys.modules; print(LLM)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "<class 'penstock.llm.LLM'>\n"), done.stderr
