"""What tests of the offline `LLM` share: its options, short ways to ask, and what must be left when it has answered."""

from __future__ import annotations

from typing import Any

from penstock import LLM, RequestOutput, SamplingParams

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "cpu_threads": 1,
    "block_size": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 4 << 20,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
TEXT = "The reservoir fills in the wet months"
CHAT = [{"role": "user", "content": "Why does it fill?"}]


def assert_empty(llm: LLM) -> None:
    engine = llm._built.engine
    assert not engine.has_work()
    assert (engine.pages.num_held, engine.pages.num_promised) == (0, 0)
    engine.pages.check()


def run(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def tokens(answers: list[RequestOutput]) -> list[list[int]]:
    return [answer.outputs[0].token_ids for answer in answers]
