"""Choices of one request: one computes the full pages of their prompt, the others find them in the cache."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.common.messages import GenerateRequest
from penstock.common.sampling import SamplingParams
from penstock.engine.request import Request
from penstock.engine.scheduler import Scheduler
from tests.engine.test_scheduler import FakeExecutor, make_scheduler, oracle


def test_choices_wait_for_the_one_that_computes_their_prompt() -> None:
    """Others do not; if it is aborted the next one leads."""
    scheduler, executor = make_scheduler(num_pages=32, budget=8), FakeExecutor(32)
    prompt = [i % 7 for i in range(22)]  # 5 full pages
    sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    for name, choice in (("n", 0), ("n", 1), ("other", 0), ("n", 2)):
        tokens = prompt if name == "n" else [1, 2]
        source = GenerateRequest(request_id=name, choice=choice, prompt_token_ids=tokens, sampling=sampling)
        scheduler.add(Request(source, 0.0))
    found: dict[str, list[int]] = {}
    started: list[str] = []
    step = 0
    while scheduler.has_work():
        plan = scheduler.plan(0.0)
        assert plan is not None
        started += [start.key for start in plan.started]
        for output in scheduler.update(executor.run(plan), 0.0).outputs:
            found.setdefault(output.key, []).extend(output.token_ids)
        step += 1
        if step == 1:
            scheduler.abort("n:0:0")
        scheduler.pages.check()
    assert started[0] == "n:0:0" and set(started) == {"n:0:0", "n:1:0", "n:2:0", "other:0:0"}
    assert found["n:1:0"] == found["n:2:0"] == oracle(prompt, 3) and found["other:0:0"] == oracle([1, 2], 3)
    assert (
        scheduler.counters.prompt_tokens <= 8 + (22 - 4) + 2 + (22 - 20) + 4
    )  # the last one computes its last page only
    assert not scheduler._siblings and scheduler.pages.num_held == 0


def choices(scheduler: Scheduler, prompt: list[int], **sampling: Any) -> list[Request]:
    """Three of one request, queued."""
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, **sampling)
    requests = [
        Request(GenerateRequest(request_id="n", choice=n, prompt_token_ids=prompt, sampling=params), 0.0)
        for n in range(3)
    ]
    for request in requests:
        scheduler.add(request)
    return requests


@pytest.mark.parametrize(("length", "shared"), [(22, 20), (20, 16), (21, 20)])
def test_choices_start_when_the_full_pages_of_their_prompt_are_there(length: int, shared: int) -> None:
    scheduler, executor = make_scheduler(budget=64), FakeExecutor(64)
    prompt = [i % 7 for i in range(length)]
    choices(scheduler, prompt)
    works = []
    while scheduler.has_work():
        plan = scheduler.plan(0.0)
        assert plan is not None and scheduler.computes_for("n") == (not works)
        works.append([(work.start, work.num_tokens) for work in plan.work])
        scheduler.update(executor.run(plan), 0.0)
    assert works[0] == [(0, length)]
    assert works[1] == [(length, 1), (shared, length - shared), (shared, length - shared)]


@pytest.mark.parametrize(
    ("length", "caching", "sampling"), [(22, False, {}), (4, True, {}), (22, True, {"prompt_logprobs": 0})]
)
def test_choices_that_would_find_nothing_wait_for_nobody(length: int, caching: bool, sampling: dict[str, int]) -> None:
    scheduler = make_scheduler(budget=99, caching=caching)
    choices(scheduler, list(range(length)), **sampling)
    plan = scheduler.plan(0.0)
    assert plan is not None and [work.num_tokens for work in plan.work] == [length] * 3


def test_a_choice_that_has_pages_of_its_own_waits_for_nobody() -> None:
    scheduler, prompt = make_scheduler(budget=8), list(range(22))
    source = GenerateRequest(request_id="n", choice=9, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=3))
    choices(scheduler, prompt)
    assert scheduler.plan(0.0) is not None and scheduler.computes_for("n")
    landed = Request(source, 0.0)
    scheduler.pages.allocate(landed.key, 6)
    landed.tokens.append(7)
    scheduler.add(landed, computed=22)
    plan = scheduler.plan(0.0)
    assert plan is not None and landed.key in [work.key for work in plan.work]
