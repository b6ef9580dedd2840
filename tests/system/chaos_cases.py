"""What chaos asks for, and what must come: every kind of request whose state has to survive a seam between two workers.

The answers are those of the engine alone, undisturbed, in this process; greedy ones are compared with Hugging Face's as
well. A case with a near-tie at any token, which may fall either way in another batch, is not used.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from msgspec import structs
from openai import AsyncOpenAI

from penstock import LLM, SamplingParams
from penstock.engine import sampler
from penstock.results import CompletionOutput
from tests.tiny_models import MIN_MARGIN, random_prompts, reference_tokens

NEW_TOKENS = 120
LENGTHS = (1, 2, 40, NEW_TOKENS)
PROMPT_LENGTHS = (3, 17, 64, 120, 200, 300)
STOP_TOKENS = 12  # of 400: an output lives 30 tokens or so once it may end
MIN_TOKENS = 50
CHOICES = 3
LOGPROB_TOLERANCE = 1e-4  # float32, batched differently

_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "top_p": 0.95},
    "penalties": {
        "temperature": 0.7,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.15,
    },
    "logprobs": {"temperature": 0.8, "logprobs": 3},
    "min_tokens": {"temperature": 0.8, "min_tokens": MIN_TOKENS},
    "stop": {"temperature": 0.8},
    "choices": {"temperature": 0.8, "n": CHOICES, "logprobs": 1},
}
KINDS = tuple(_KINDS)
_ENDS_BY_ITSELF = ("min_tokens", "stop")


@dataclass(frozen=True)
class Choice:
    """One choice of an answer, expected or received."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)  # in pieces, as it came
    logprobs: list[tuple[float, float]] = field(default_factory=list)  # of the token, of the likeliest one
    finish: list[str] = field(default_factory=list)  # its reason, once there is one


@dataclass(frozen=True)
class Case:
    """A request. `expected`: its choices at full length."""

    kind: str
    prompt: list[int]
    sampling: SamplingParams
    expected: list[Choice]

    def lengths(self) -> Sequence[int]:
        """Values of max_tokens for which the expected answer is known."""
        return (NEW_TOKENS,) if self.kind in _ENDS_BY_ITSELF else LENGTHS

    def fields(self, max_tokens: int) -> dict[str, Any]:
        """The request as OpenAI's client takes it."""
        wanted = structs.replace(self.sampling, max_tokens=max_tokens)
        names = ("temperature", "top_p", "seed", "n", "presence_penalty", "frequency_penalty", "max_tokens", "logprobs")
        own = ("repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos")
        extra = {name: getattr(wanted, name) for name in own} | {"return_token_ids": True}
        return {
            "model": "tiny",
            "prompt": self.prompt,
            **{name: getattr(wanted, name) for name in names if getattr(wanted, name) is not None},
            **({"stop": wanted.stop} if wanted.stop else {}),
            "extra_body": extra,
        }


@dataclass
class Answer:
    """What has come of one request so far."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: tuple[int, int] | None = None  # prompt and completion tokens

    async def ask(self, client: AsyncOpenAI, case: Case, max_tokens: int, *, stream: bool) -> None:
        """Ask, and take in what comes. Raises what the client raises, and `httpx.ReadError` if a stream just ends."""
        fields = case.fields(max_tokens)
        if not stream:
            self._take(await client.completions.create(**fields))
            return
        options = {"include_usage": True}
        async for chunk in await client.completions.create(**fields, stream=True, stream_options=options):
            self._take(chunk)
        if self.usage is None:
            raise httpx.ReadError("the stream ended without its usage")

    def _take(self, said: Any) -> None:
        for part in said.choices:
            choice = self.choices.setdefault(part.index, Choice())
            choice.token_ids.extend(part.token_ids or [])
            choice.text.append(part.text)
            if part.logprobs is not None:
                best = [max(top.values()) for top in part.logprobs.top_logprobs]
                choice.logprobs.extend(zip(part.logprobs.token_logprobs, best, strict=True))
            if part.finish_reason is not None:
                choice.finish.append(part.finish_reason)
        if said.usage is not None:
            self.usage = said.usage.prompt_tokens, said.usage.completion_tokens

    def fault(self, case: Case, max_tokens: int, *, whole: bool) -> str:
        """What is wrong with it, "" if nothing is. What came of one that broke off has to be right as well."""
        for index, choice in self.choices.items():
            expected = case.expected[index]
            wanted = expected.token_ids[:max_tokens]
            number = len(wanted) if whole else len(choice.token_ids)
            if choice.token_ids != wanted[:number]:
                return f"choice {index}: tokens {choice.token_ids} instead of {wanted}"
            text, full = "".join(choice.text), "".join(expected.text)
            if whole and len(wanted) == len(expected.token_ids):
                if text != full or choice.finish != expected.finish:
                    return f"choice {index}: {text!r}, {choice.finish} instead of {full!r}, {expected.finish}"
            elif whole and choice.finish != ["length"]:
                return f"choice {index}: finish {choice.finish} instead of length"
            elif not whole and not full.startswith(text):
                return f"choice {index}: {text!r} is not how {full!r} begins"
            if case.sampling.logprobs is not None:
                pairs = zip(choice.logprobs, expected.logprobs, strict=False)
                if len(choice.logprobs) != len(choice.token_ids) or not all(_close(*pair) for pair in pairs):
                    return f"choice {index}: logprobs {choice.logprobs} instead of {expected.logprobs}"
        if not whole:
            return ""
        tokens = sum(len(choice.token_ids) for choice in self.choices.values())
        if self.usage != (len(case.prompt), tokens):
            return f"usage {self.usage} instead of {(len(case.prompt), tokens)}"
        return "" if len(self.choices) == case.sampling.n else f"{len(self.choices)} choices"


def make_cases(path: Path, chooser: random.Random, number: int) -> list[Case]:
    """Cases of every kind in turn, at least `number`, less those with a near-tie."""
    first = chooser.randrange(1 << 40)  # all seeds are different: a row is known by its seed
    drafts = [
        SamplingParams(**_KINDS[KINDS[i % len(KINDS)]], seed=first + i, max_tokens=NEW_TOKENS, ignore_eos=True)
        for i in range(number + len(KINDS))
    ]
    lengths = [chooser.choice(PROMPT_LENGTHS) for _ in drafts]
    prompts = random_prompts(lengths, seed=chooser.randrange(1 << 32))
    llm = LLM(str(path), device="cpu", cpu_threads=1, block_size=4, kv_cache_memory_bytes=32 << 20, max_model_len=512)
    try:
        for i, draft in enumerate(drafts):
            if KINDS[i % len(KINDS)] == "min_tokens":
                ids = chooser.sample(range(5, 400), STOP_TOKENS)
                drafts[i] = structs.replace(draft, stop_token_ids=ids)
        with _margins() as margins:
            outputs = _generate(llm, prompts, drafts)
            stopping = [i for i in range(len(drafts)) if KINDS[i % len(KINDS)] == "stop"]
            for i in stopping:
                drafts[i] = structs.replace(drafts[i], stop=[_stop_string(llm, outputs[i][0].token_ids)])
            again = _generate(llm, [prompts[i] for i in stopping], [drafts[i] for i in stopping])
            outputs |= dict(zip(stopping, again.values(), strict=True))
    finally:
        llm.close()
    cases = []
    for i, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
        expected = [_expected(output) for output in outputs[i]]
        if draft.greedy:
            reference = reference_tokens(path, [prompt], NEW_TOKENS, until_tie=True)[0]
            assert expected[0].token_ids[: len(reference)] == reference
            fair = len(reference) == NEW_TOKENS
        else:
            seeds = [sampler.noise_seed(draft.seed, choice) for choice in range(draft.n)]
            fair = min(margins[one] for one in seeds) >= MIN_MARGIN
        if fair:
            cases.append(Case(KINDS[i % len(KINDS)], prompt, draft, expected))
    assert len(cases) >= number, f"only {len(cases)} of {len(drafts)} cases are without a near-tie"
    return cases


def _generate(llm: LLM, prompts: list[list[int]], sampling: list[SamplingParams]) -> dict[int, list[CompletionOutput]]:
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return {i: answer.outputs for i, answer in enumerate(answers)}


def _expected(output: CompletionOutput) -> Choice:
    logprobs = [
        (at[token].logprob, max(one.logprob for one in at.values()))
        for token, at in zip(output.token_ids, output.logprobs or [], strict=False)
    ]
    return Choice(list(output.token_ids), [output.text], logprobs, [str(output.finish_reason)])


def _stop_string(llm: LLM, token_ids: Sequence[int]) -> str:
    """A text that begins in one token and ends in the next one, first seen late in the output."""
    tokenizer = llm.get_tokenizer()
    whole = tokenizer.decode(list(token_ids))
    for at in range(2 * len(token_ids) // 3, len(token_ids) - 1):
        one, two = (tokenizer.decode([token]) for token in token_ids[at : at + 2])
        text = one[-2:] + two[:2]
        if "\ufffd" not in text and len(text) > 2 and whole.find(text) > len(whole) // 3:
            return str(text)
    return "\x00never"  # this output is all bytes of broken characters: it ends at its limit


def _close(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(abs(a - b) <= LOGPROB_TOLERANCE for a, b in zip(one, other, strict=True))


@contextlib.contextmanager
def _margins() -> Iterator[dict[int, float]]:
    """For each row, by its noise seed: the smallest distance between the best and the second best score of a draw."""
    margins: dict[int, float] = {}
    original = sampler.draw_scores

    def noting(logits: torch.Tensor, rows: Sequence[sampler.SamplingRow]) -> torch.Tensor:
        scores = original(logits, rows)
        best, second = scores.topk(2).values.unbind(-1)
        for row, margin in zip(rows, (best - second).tolist(), strict=True):
            margins[row.noise_seed] = min(margin, margins.get(row.noise_seed, margin))
        return scores

    sampler.draw_scores = noting
    try:
        yield margins
    finally:
        sampler.draw_scores = original
