"""`AsyncLLM` in this process: tokens as they come, equal to Hugging Face; aborts, errors, an engine that is empty."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from penstock import AsyncEngineArgs, AsyncLLM, AsyncLLMEngine, RequestOutput, SamplingParams
from penstock.common.messages import GenerateRequest
from tests.tiny_models import random_prompts, reference_tokens

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "cpu_threads": 1,
    "block_size": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 4 << 20,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
WAIT_S = 60.0


@pytest.fixture(scope="module")
def shared(checkpoints: dict[str, Path]) -> Iterator[AsyncLLM]:
    engine = AsyncLLM(str(checkpoints["llama"]), **OPTIONS)
    yield engine
    engine.shutdown()
    assert not engine.is_running


@pytest_asyncio.fixture
async def engine(shared: AsyncLLM) -> AsyncIterator[AsyncLLM]:
    yield shared
    await assert_empty(shared)


async def assert_empty(engine: AsyncLLM) -> None:
    """Aborts are carried out before the next step: soon."""
    inside = engine._llm.engine
    deadline = time.monotonic() + WAIT_S
    while inside.has_work() or inside.pages.num_held or inside.pages.num_promised:
        assert time.monotonic() < deadline, "something is left in the engine"
        await asyncio.sleep(0.01)
    assert engine._streams == {}


async def collect(
    engine: AsyncLLM, prompt: Any, params: SamplingParams = GREEDY, name: str = ""
) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, name or None)]


@pytest.mark.asyncio
async def test_tokens_come_one_by_one_and_equal_hugging_face(engine: AsyncLLM, checkpoints: dict[str, Path]) -> None:
    prompts = random_prompts([1, 3, 17, 40, 75], seed=8)
    answers = await asyncio.gather(*(collect(engine, prompt, name=f"r{i}") for i, prompt in enumerate(prompts)))
    expected = reference_tokens(checkpoints["llama"], prompts, 12)
    for number, (seen, tokens) in enumerate(zip(answers, expected, strict=True)):
        assert seen[-1].finished and seen[-1].outputs[0].token_ids == tokens
        assert seen[-1].outputs[0].text == engine.get_tokenizer().decode(tokens)
        assert {answer.request_id for answer in seen} == {f"r{number}"} and len(seen) > 1
        lengths = [len(answer.outputs[0].token_ids) for answer in seen]
        assert lengths == sorted(lengths) and not any(answer.finished for answer in seen[:-1])
        assert all(tokens[:length] == a.outputs[0].token_ids for length, a in zip(lengths, seen, strict=True))


@pytest.mark.asyncio
async def test_choices_scores_and_stop_strings(engine: AsyncLLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    last = (await collect(engine, "The reservoir fills", params))[-1]
    assert len({tuple(output.token_ids) for output in last.outputs}) == 3 and last.finished
    assert [len(output.logprobs or []) for output in last.outputs] == [6, 6, 6]
    assert last.prompt_logprobs is not None and len(last.prompt_logprobs) == len(last.prompt_token_ids)
    whole = (await collect(engine, "The reservoir fills"))[-1].outputs[0].text
    stop = whole[4:6]
    cut = (await collect(engine, "The reservoir fills", SamplingParams(temperature=0, max_tokens=12, stop=[stop])))[-1]
    assert cut.outputs[0].text == whole[: whole.index(stop)] and cut.outputs[0].stop_reason == stop


@pytest.mark.asyncio
async def test_an_abort_ends_a_request_with_what_there_is(engine: AsyncLLM) -> None:
    seen: list[RequestOutput] = []
    async for output in engine.generate("The river", LONG, "gone"):
        seen.append(output)
        if len(seen) == 2:
            await engine.abort("gone")
            await engine.abort(["gone", "never was"])
    assert seen[-1].finished and seen[-1].outputs[0].finish_reason == "abort"
    assert 0 < len(seen[-1].outputs[0].token_ids) < 400
    early = asyncio.ensure_future(collect(engine, "The mill", LONG, "early"))
    while "early" not in engine._streams:
        await asyncio.sleep(0)
    await engine.abort("early")
    assert (await early)[-1].outputs[0].finish_reason == "abort"


@pytest.mark.asyncio
async def test_who_leaves_or_is_cancelled_ends_the_request(engine: AsyncLLM) -> None:
    async with aclosing(engine.generate("The river", LONG)) as outputs:
        async for _ in outputs:
            break
    await assert_empty(engine)
    task = asyncio.ensure_future(collect(engine, "The river", LONG, "task"))
    while not engine._llm.engine.has_work():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.asyncio
async def test_mistakes_are_said_and_cost_nothing(engine: AsyncLLM) -> None:
    for prompt, params, words in (
        ([], GREEDY, "a prompt must have from 1 to 511 tokens"),
        ([1, 99999], GREEDY, "must hold token ids from 0"),
        ("x", SamplingParams(truncate_prompt_tokens=9999), "truncate_prompt_tokens must be at most"),
    ):
        with pytest.raises(ValueError, match=words):
            await collect(engine, prompt, params)
    async for _ in engine.generate("The river", GREEDY, "same"):
        with pytest.raises(ValueError, match="a request 'same' is running"):
            await collect(engine, "x", GREEDY, "same")
    assert len(await collect(engine, "The river", GREEDY, "same")) > 0, "the name is free again"


def test_several_event_loops(shared: AsyncLLM) -> None:
    found: list[list[int]] = []

    def program() -> None:
        found.append(asyncio.run(collect(shared, "The mill"))[-1].outputs[0].token_ids)

    threads = [threading.Thread(target=program) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and found[0] == found[1] == found[2]


@pytest.mark.asyncio
async def test_a_failing_engine_fails_its_requests_and_all_later_ones(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsyncLLMEngine.from_engine_args(
        AsyncEngineArgs(str(checkpoints["qwen2"]), trust_remote_code=True, **OPTIONS)
    )

    def broken(plan: object) -> None:
        raise RuntimeError("out of memory")

    assert len(await collect(engine, "The river")) > 1
    await engine.check_health()
    monkeypatch.setattr(engine._llm.engine.executor, "submit", broken)
    with pytest.raises(RuntimeError, match="the engine failed: out of memory"):
        await collect(engine, "The river", LONG)
    assert engine.errored and not engine.is_running
    with pytest.raises(RuntimeError, match="out of memory"):
        await engine.check_health()
    with pytest.raises(RuntimeError, match="the engine failed: out of memory"):
        await collect(engine, "The river")
    await assert_empty(engine)
    engine.shutdown()
    with pytest.raises(ValueError, match="it is shut down"):
        await collect(engine, "The river")


@pytest.mark.asyncio
async def test_a_request_that_cannot_be_taken_ends_alone(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    add, added = engine._llm.engine.add, []

    def broken(request: GenerateRequest) -> str:
        added.append(add(request))
        if request.request_id.startswith("bad"):
            raise TypeError("not what it should be")
        return added[-1]

    monkeypatch.setattr(engine._llm.engine, "add", broken)
    others = engine.generate("The river", LONG, "good")
    await anext(others)
    with pytest.raises(TypeError, match="not what it should be"):
        await collect(engine, "The mill", LONG, "bad")
    assert [engine._llm.engine.scheduler.get(key) is None for key in added] == [False, True]
    last = [output async for output in others][-1]
    assert len(last.outputs[0].token_ids) == 400 and not engine.errored


@pytest.mark.asyncio
async def test_choices_that_come_after_one_has_failed_are_given_up(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the backend may be that quick."""
    backend, submit = engine._backend, engine._backend.submit

    def failing(request: GenerateRequest, deliver: Callable[[Any], None]) -> None:
        submit(request, deliver)
        if request.choice == 0:
            deliver(TypeError("not what it should be"))

    monkeypatch.setattr(backend, "submit", failing)
    with pytest.raises(TypeError, match="not what it should be"):
        await collect(engine, "The mill", SamplingParams(n=3, max_tokens=400, ignore_eos=True))
    before = engine._llm.engine.steps
    await assert_empty(engine)
    assert engine._llm.engine.steps - before < 300


@pytest.mark.asyncio
async def test_a_shutdown_ends_what_is_running(checkpoints: dict[str, Path]) -> None:
    async with AsyncLLM(str(checkpoints["llama"]), **OPTIONS) as engine:
        task = asyncio.ensure_future(collect(engine, "The river", LONG))
        while not engine._llm.engine.has_work():
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(RuntimeError, match="it was shut down"):
            await task
    with pytest.raises(ValueError, match="it is closed, or belongs to the process that this one is a fork of"):
        engine._backend.submit(engine._llm.intake.choices("x", LONG)[0].source, lambda new: None)
    thread = engine._backend._thread
    del engine
    gc.collect()
    assert not thread.is_alive()
