"""`LLM` and `AsyncLLM` over a fleet (`prefill_workers=1`): the answers of one process, and no process left."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock import LLM, AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams, StructuredOutputsParams
from penstock.fleet_llm import FleetLLM
from tests.forking import start_server
from tests.system.fleets import assert_idle
from tests.tiny_models import random_prompts, reference_tokens

pytestmark = pytest.mark.system
ENGINE: dict[str, Any] = {"device": "cpu", "block_size": 4, "kv_cache_memory_bytes": 4 << 20, "max_model_len": 256}
FLEET: dict[str, Any] = {"prefill_workers": 1, "decode_workers": 1, "lease_s": 30.0, **ENGINE}
TEXT = "The reservoir fills in the wet months"


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path]) -> Iterator[AsyncLLM]:
    """A fleet, used by both classes."""
    engine = AsyncLLM(str(checkpoints["llama"]), **FLEET)
    yield engine
    assert isinstance(engine._llm, FleetLLM)
    assert_idle(engine._llm.thread.fleet)
    engine.shutdown()


@pytest.fixture(scope="module")
def fleet(engine: AsyncLLM) -> LLM:
    return engine._llm


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path]) -> Iterator[LLM]:
    llm = LLM(str(checkpoints["llama"]), **ENGINE)
    yield llm
    llm.close()


def same(mine: list[RequestOutput], others: list[RequestOutput]) -> None:
    """All that is told of an answer, but for its name and what was cached."""
    for one, other in zip(mine, others, strict=True):
        assert (one.prompt, one.prompt_token_ids, one.finished) == (other.prompt, other.prompt_token_ids, True)
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert (a.token_ids, a.text, a.finish_reason, a.stop_reason) == (
                b.token_ids,
                b.text,
                b.finish_reason,
                b.stop_reason,
            )
            assert (a.logprobs is None) == (b.logprobs is None)
            for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
                assert {i: (p.rank, p.decoded_token) for i, p in x.items()} == {
                    i: (p.rank, p.decoded_token) for i, p in y.items()
                }
                assert [p.logprob for p in x.values()] == pytest.approx([p.logprob for p in y.values()], abs=1e-4)
        assert [position and set(position) for position in one.prompt_logprobs or []] == [
            position and set(position) for position in other.prompt_logprobs or []
        ]


def test_greedy_equals_hugging_face(fleet: LLM, checkpoints: dict[str, Path]) -> None:
    assert type(fleet) is FleetLLM
    prompts = random_prompts([1, 3, 17, 40, 75], seed=8)
    answers = fleet.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    expected = reference_tokens(checkpoints["llama"], prompts, 12)
    assert [answer.outputs[0].token_ids for answer in answers] == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=3, prompt_logprobs=2),
        SamplingParams(temperature=0.7, seed=1, max_tokens=20, stop=["e"], repetition_penalty=1.2),
        SamplingParams(temperature=0.0, max_tokens=None),
        SamplingParams(temperature=0.0, max_tokens=4, detokenize=False, ignore_eos=True),
    ],
    ids=["choices", "scores", "stop", "to the end", "no text"],
)
def test_answers_are_those_of_one_process(fleet: LLM, alone: LLM, params: SamplingParams) -> None:
    prompts: list[Any] = [TEXT, {"prompt": "The mill", "cache_salt": "s"}, *random_prompts([30, 9], seed=4)]
    same(fleet.generate(prompts, params, use_tqdm=False), alone.generate(prompts, params, use_tqdm=False))


def test_chats_and_beams(fleet: LLM, alone: LLM) -> None:
    chat = [{"role": "user", "content": "Why does it fill?"}]
    params = SamplingParams(temperature=0, max_tokens=9)
    same(fleet.chat(chat, params, use_tqdm=False), alone.chat(chat, params, use_tqdm=False))
    width = BeamSearchParams(beam_width=3, max_tokens=5)
    mine, other = (llm.beam_search([TEXT, "The mill"], width) for llm in (fleet, alone))
    assert [[s.tokens for s in output.sequences] for output in mine] == [
        [s.tokens for s in output.sequences] for output in other
    ]


def test_forms_are_kept_and_those_that_cannot_be_are_refused(fleet: LLM, alone: LLM) -> None:
    form = StructuredOutputsParams(choice=["the wet months", "the dry ones"])
    params = SamplingParams(temperature=0, max_tokens=30, structured_outputs=form)
    answers = [llm.generate(TEXT, params, use_tqdm=False) for llm in (fleet, alone)]
    same(*answers)
    assert answers[0][0].outputs[0].text in form.choice  # type: ignore[operator]
    wrong = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    with pytest.raises(ValueError, match="regex"):
        fleet.generate(TEXT, wrong, use_tqdm=False)


def test_many_prompts_at_once_are_all_answered(fleet: LLM) -> None:
    """More than a router lets clients queue: whoever gives a list wants all of it, however long that takes."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    answers = fleet.generate([[7, 8, 9]] * 1300, params, use_tqdm=False)
    assert len({tuple(answer.outputs[0].token_ids) for answer in answers}) == 1 and answers[-1].finished


def test_what_cannot_be_is_said_before_anything_is_sent(fleet: LLM) -> None:
    with pytest.raises(ValueError, match="a prompt must have from 1 to 255 tokens"):
        fleet.generate([TEXT, []], use_tqdm=False)
    with pytest.raises(ValueError, match="in its workers"):
        _ = fleet.engine
    assert "prefill-0 on cpu, decode-0 on cpu" in fleet.describe() and not fleet.on_gpu


def test_async_tokens_come_as_they_are_made(engine: AsyncLLM, checkpoints: dict[str, Path]) -> None:
    prompts = random_prompts([5, 33], seed=2)

    async def collect(prompt: list[int]) -> list[RequestOutput]:
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        return [output async for output in engine.generate(prompt, params)]

    async def program() -> list[list[RequestOutput]]:
        found = await asyncio.gather(*map(collect, prompts))
        seen = 0
        output = None
        async for output in engine.generate("The river", SamplingParams(max_tokens=200, ignore_eos=True), "gone"):  # noqa: B007
            seen += 1
            if seen == 2:
                await engine.abort("gone")
        assert output is not None
        assert output.outputs[0].finish_reason == "abort" and len(output.outputs[0].token_ids) < 200
        return list(found)

    answers = asyncio.run(program())
    assert [seen[-1].outputs[0].token_ids for seen in answers] == reference_tokens(checkpoints["llama"], prompts, 16)
    assert all(len(seen) > 1 for seen in answers)


def test_a_shutdown_ends_what_is_running(checkpoints: dict[str, Path]) -> None:
    engine = AsyncLLM(str(checkpoints["llama"]), decode_workers=1, lease_s=30.0, **ENGINE)
    params = SamplingParams(max_tokens=250, ignore_eos=True)
    begun = [asyncio.Event() for _ in range(3)]

    async def collect(event: asyncio.Event) -> None:
        async for _ in engine.generate("The river", params):
            event.set()

    async def program() -> list[BaseException | None]:
        tasks = [asyncio.ensure_future(collect(event)) for event in begun]
        await asyncio.gather(*(event.wait() for event in begun))
        await asyncio.to_thread(engine.shutdown)
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    assert [type(error).__name__ for error in asyncio.run(program())] == ["Unavailable"] * 3
    assert not engine.is_running and engine._streams == {}


PROGRAM = """
import sys
from penstock import LLM, SamplingParams
llm = LLM(sys.argv[1], decode_workers=1, device="cpu", kv_cache_memory_bytes=4 << 20, max_model_len=64)
[answer] = llm.generate("The river", SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
print(len(answer.outputs[0].token_ids))
print(*llm.thread.fleet.group.pids().values(), flush=True)
{end}
"""


@pytest.mark.parametrize(("end", "status"), [("", 0), ("1 / 0", 1)])
def test_no_process_outlives_the_program(end: str, status: int, checkpoints: dict[str, Path]) -> None:
    command = [sys.executable, "-c", PROGRAM.format(end=end), str(checkpoints["llama"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=250)
    assert done.returncode == status, done.stderr
    length, pids = done.stdout.splitlines()
    assert length == "4" and len(pids.split()) == 2  # Redis and the worker
    assert "Exception ignored" not in done.stderr and ("ZeroDivisionError" in done.stderr) == (end == "1 / 0")
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(int(pid)) for pid in pids.split()):
        assert time.monotonic() < deadline, "a process was left"
        time.sleep(0.05)


def test_a_model_that_cannot_be_loaded_leaves_nothing(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    start_server()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(Exception, match="decode-0 did not start"):
        LLM(str(checkpoints["llama"]), decode_workers=1, **{**ENGINE, "max_model_len": 9999})
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
