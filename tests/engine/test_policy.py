"""Batch policies: budgets by hand, gathering on a scheduler, and what gathering is for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from penstock.common.config import EngineConfig
from penstock.engine.build import limits_of
from penstock.engine.pages import PageManager
from penstock.engine.policy import THROUGHPUT, DecodePolicy, PrefillPolicy, enough_gathered
from penstock.engine.request import Request
from penstock.engine.scheduler import Scheduler
from tests.engine.test_scheduler import FakeExecutor, joined, make_request, make_scheduler, oracle


@pytest.mark.parametrize(
    ("policy", "decode_tokens", "expected"),
    [
        (PrefillPolicy(), 0, 64),
        (PrefillPolicy(), 4, 60),
        (DecodePolicy(), 0, 64),
        (DecodePolicy(), 1, 16),
        (DecodePolicy(), 60, 4),
        (DecodePolicy(), 64, 0),
        (DecodePolicy(mixed_chunk_tokens=64), 1, 63),
        (DecodePolicy(mixed_chunk_tokens=1), 1, 1),
        (DecodePolicy(mixed_chunk_tokens=10), 0, 40),
        (DecodePolicy(mixed_chunk_tokens=20), 0, 64),
        (DecodePolicy(mixed_chunk_tokens=20), 50, 14),
        (THROUGHPUT, 0, 64),
        (THROUGHPUT, 1, 63),
    ],
)
def test_prompt_tokens_in_a_step(policy: DecodePolicy | PrefillPolicy, decode_tokens: int, expected: int) -> None:
    assert policy.prefill_budget(64, decode_tokens) == expected


@pytest.mark.parametrize(
    ("left", "moved_per_token", "expected"),
    [
        (1, 9.0, [1]),
        (32, 9.0, [32]),
        (33, 9.0, [32, 1]),
        (64, 9.0, [32, 32]),
        (65, 9.0, [33, 32]),
        (256, 9.0, [224, 32]),
        (288, 9.0, [256, 32]),
        (400, 9.0, [256, 112, 32]),
        (256, 2.5, [80, 80, 64, 32]),  # the pages of 80 move while 32 tokens are computed
        (100, 0.5, [32, 32, 32, 4]),
        (100, 0.0, [32, 32, 32, 4]),
    ],
)
def test_a_prefill_worker_computes_the_beginning_of_a_long_prompt_in_few_steps(
    left: int, moved_per_token: float, expected: list[int]
) -> None:
    policy, chunks = PrefillPolicy(step_tokens=32), []
    while left:
        chunks.append(policy.lone_chunk(256, policy.prefill_budget(256, 0), left, moved_per_token))
        left -= chunks[-1]
    assert chunks == expected


def test_prompts_behind_a_long_one_start_when_only_its_last_step_is_left() -> None:
    scheduler = make_scheduler(budget=64, policy=PrefillPolicy(step_tokens=8), caching=False)
    executor = FakeExecutor(64)
    for name, length in (("long", 42), ("short", 5), ("next", 30)):
        scheduler.add(Request(make_request(name, [1] * length), 0.0, moved_per_token=100.0))
    steps = []
    while scheduler.has_work():
        plan = scheduler.plan(0.0)
        assert plan is not None
        steps.append([(work.key.partition(":")[0], work.num_tokens) for work in plan.work])
        scheduler.update(executor.run(plan), 0.0)
    assert steps == [
        [("long", 34)],
        [("long", 8)],
        [("short", 5), ("next", 3)],
        [("next", 19)],
        [("next", 8)],
    ]


@pytest.mark.parametrize(
    ("policy", "on_gpu", "expected"),
    [
        (PrefillPolicy(), True, (8192, 2047, 2048)),
        (PrefillPolicy(), False, (2048, 2047, 2048)),
        (DecodePolicy(mixed_chunk_tokens=152), True, (8192, 152, 608)),
        (DecodePolicy(), True, (8192, 2048, 8192)),
    ],
)
def test_steps_that_are_usual_under_a_policy(
    policy: DecodePolicy | PrefillPolicy, on_gpu: bool, expected: tuple[int, int, int]
) -> None:
    limits = limits_of(EngineConfig(model="m"), policy, 4096, on_gpu=on_gpu)
    assert (limits.max_num_batched_tokens, limits.mixed_chunk_tokens, limits.prompt_step_tokens) == expected
    asked = limits_of(EngineConfig(model="m", max_num_batched_tokens=64), policy, 4096, on_gpu=on_gpu)
    assert asked.max_num_batched_tokens == 64 >= asked.prompt_step_tokens


@pytest.mark.parametrize(
    ("num_decodes", "joining", "left_waiting", "fills_a_step", "expected"),
    [
        (240, 15, 100, False, False),
        (240, 16, 100, False, True),  # a sixteenth of 256
        (240, 1, 100, True, True),
        (240, 1, 0, False, True),  # there is nobody else to wait for
        (240, 0, 100, False, False),  # no room
        (7, 1, 3, False, True),
    ],
)
def test_when_enough_have_gathered(
    num_decodes: int, joining: int, left_waiting: int, fills_a_step: bool, expected: bool
) -> None:
    assert expected is enough_gathered(
        1 / 16, num_decodes=num_decodes, joining=joining, left_waiting=left_waiting, fills_a_step=fills_a_step
    )


def run(policy: DecodePolicy, *, num_pages: int) -> tuple[int, int]:
    """60 requests, all there from the start; steps, and steps with prompts among decodes."""
    chooser = random.Random(3)
    scheduler = Scheduler(
        PageManager(num_pages, 4, caching=False),
        policy,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_model_len=64,
        hash_scope="test",
    )
    executor = FakeExecutor(num_pages)
    prompts = [[chooser.randrange(50)] * chooser.randrange(1, 12) for _ in range(60)]
    wanted = [chooser.randrange(8, 48) for _ in prompts]
    for i, (prompt, count) in enumerate(zip(prompts, wanted, strict=True)):
        scheduler.add(Request(make_request(str(i), prompt, count), 0.0))
    outputs, steps, mixed = [], 0, 0
    while scheduler.has_work():
        plan = scheduler.plan(0.0)
        if plan is None:
            continue
        steps += 1
        mixed += 0 < len(plan.started) < len(plan.work)
        outputs += scheduler.update(executor.run(plan), 0.0).outputs
    assert joined(outputs) == {str(i): oracle(p, n) for i, (p, n) in enumerate(zip(prompts, wanted, strict=True))}
    return steps, mixed


@pytest.mark.parametrize("num_pages", [400, 90])  # the batch is bounded by max_num_seqs, or by pages
def test_gathering_saves_mixed_steps_and_costs_few_others(num_pages: int) -> None:
    steps, mixed = run(replace(THROUGHPUT, gather_share=0.0), num_pages=num_pages)
    gathered_steps, gathered_mixed = run(replace(THROUGHPUT, gather_share=0.25), num_pages=num_pages)
    assert gathered_mixed < mixed / 1.5
    assert gathered_steps < steps * 1.15


def test_gathering_is_for_throughput_only() -> None:
    assert DecodePolicy().gather_share == PrefillPolicy().gather_share == 0.0
    assert THROUGHPUT.gather_share > 0.0
