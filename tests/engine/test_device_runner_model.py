"""The GPU's executor on CPU, its ops in their plain form, against a model that reads what stands in the pages.

Random requests through engine and executor: chunks, prefixes from the cache, preemption, hand-offs, stops noticed a
step late, aborts. The model's scores are a function of all tokens that a sequence's page table leads to, so that one
token in a wrong slot, or one wrong length, changes all that follows. What is expected comes from lists of tokens and
engine/sampler.py, a sequence at a time. Captured steps are played: same layouts, same static buffers, no graph.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from penstock.common.messages import GenerateRequest, TokenLogprobs, request_key
from penstock.common.sampling import SamplingParams
from penstock.engine import decode_graphs, mixed_steps
from penstock.engine.core import Engine
from penstock.engine.device_runner import DeviceRunner
from penstock.engine.kv_pool import KVLayout, KVPool
from penstock.engine.pages import PageManager
from penstock.engine.plan import SequenceStart, SequenceWork, StepPlan
from penstock.engine.policy import THROUGHPUT, DecodePolicy
from penstock.engine.sampler import SamplingRow, noise_seed, sample
from penstock.engine.scheduler import Scheduler
from penstock.kernels.paged_batch import PagedBatch
from tests.engine.fake_constraints import FORM, FakeConstraints, fake_mask

VOCAB, PAGE_SIZE, CONTEXT = 24, 4, 40
EOS = 3
_WEIGHTS = torch.randint(1, 1 << 20, (CONTEXT, VOCAB), generator=torch.Generator().manual_seed(0))


def scores(tokens: Sequence[int]) -> Tensor:
    """Logits [vocab] after these tokens: no two alike, and each token counts."""
    mixed = (torch.tensor(tokens)[:, None] + 1) * _WEIGHTS[: len(tokens)]
    return (mixed.sum(0) % 9973).float() / 1000 + torch.arange(VOCAB) * 1e-5


class PageReader:
    """A model whose keys are (token, position), and whose hidden states are the scores."""

    spec = SimpleNamespace(vocab_size=VOCAB)

    def forward(
        self,
        token_ids: Tensor,
        batch: PagedBatch,
        kv: Sequence[tuple[Tensor, Tensor]],
        last_tokens: Tensor | None = None,
    ) -> Tensor:
        keys = kv[0][0]
        own = batch.slots >= 0
        slots = batch.slots[own]
        keys[slots // PAGE_SIZE, 0, slots % PAGE_SIZE] = torch.stack((token_ids, batch.positions), 1)[own].float()
        every = last_tokens is None  # hidden states of all tokens are asked for
        rows_wanted = len(token_ids) if every else len(batch.contexts)
        hidden = torch.full((rows_wanted, VOCAB), torch.nan)  # padding is NaN, and must not matter
        contexts, rows, starts = batch.contexts.tolist(), batch.table_rows.tolist(), batch.query_starts.tolist()
        for s, context in enumerate(contexts):
            if context:
                pages = batch.page_tables[rows[s], : -(-context // PAGE_SIZE)].long()
                cached = keys[pages, 0].flatten(0, 1)[:context].long()
                assert cached[:, 1].tolist() == list(range(context)), "a token is not where it belongs"
                assert batch.positions[starts[s + 1] - 1] == context - 1
                assert last_tokens is None or last_tokens[s] == starts[s + 1] - 1
                for row in range(starts[s], starts[s + 1]) if every else (s,):
                    known = context - (starts[s + 1] - 1 - row) if every else context
                    hidden[row] = scores(cached[:known, 0].tolist())
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@dataclass(frozen=True)
class _Played:
    """Stands for a graph: computes the step again, and writes its result where the first run left it.

    The graphs of an engine share their memory: what the others left is lost.
    """

    step: Callable[[], Tensor]
    result: Tensor
    others: list[_Played]

    def replay(self) -> None:
        for other in self.others:
            other.result.fill_(-1)
        self.result.copy_(self.step())


def capture(runner: DeviceRunner) -> None:
    """What `DeviceRunner.capture` does on a GPU."""
    played: list[_Played] = []

    def record(step: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        with torch.inference_mode():
            result = step()
        played.append(_Played(step, result, played))
        return played[-1], result

    mixed: Any = runner._mixed_steps
    for shape in mixed._shapes:
        buffer, inputs, batch = mixed._empty(shape)
        graph, logits = record(lambda i=inputs, b=batch: mixed._step(i, b, True))  # type: ignore[misc]
        mixed._captured[shape] = mixed_steps._Captured(graph, buffer, batch, logits)
    decode: Any = runner._decode_steps
    for size in decode._sizes:
        decode._captured[size] = decode_graphs._Captured(*record(lambda n=size: decode._step(n)))  # type: ignore[misc]
    runner._state.set_turn(runner._turn)


def drawable(row: SamplingRow, ending: set[int]) -> set[int]:
    """Tokens that a request's rules leave."""
    sampling, output = row.sampling, row.tokens[row.prompt_len :]
    left = set(range(VOCAB) if sampling.allowed_token_ids is None else sampling.allowed_token_ids)
    if len(output) < sampling.min_tokens:
        left -= ending
    return {
        token
        for token in left
        if not any([*output, token][-len(word) :] == list(word) for word in sampling.bad_words_token_ids)
    }


def expected(source: GenerateRequest) -> tuple[list[int], list[TokenLogprobs | None]]:
    """All tokens of a request's output, and logprobs of those that are still to come."""
    sampling, tokens = source.sampling, [*source.prompt_token_ids, *source.output_token_ids]
    prompt_len = len(source.prompt_token_ids)
    ending = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else source.eos_token_ids)}
    row = SamplingRow(
        sampling,
        noise_seed(sampling.seed, source.choice),
        tokens,
        prompt_len,
        tuple(ending) * (sampling.min_tokens > 0),
    )
    logprobs: list[TokenLogprobs | None] = []
    while True:
        masks = {0: fake_mask(tokens[prompt_len:], VOCAB)} if sampling.structured_outputs else {}
        if not masks and not drawable(row, ending):
            return tokens[prompt_len:], logprobs
        (token,), (logprob,) = sample(scores(tokens)[None], [row], masks)
        tokens.append(token)
        logprobs.append(logprob)
        count = len(tokens) - prompt_len
        ended = token in ending and count >= sampling.min_tokens
        if ended or count == sampling.max_tokens or len(tokens) == CONTEXT:
            return tokens[prompt_len:], logprobs


def random_sampling(pick: random.Random) -> SamplingParams:
    count = pick.randrange(1, 20)
    fields: dict[str, Any] = {
        "max_tokens": count,
        "seed": pick.randrange(100),
        "logprobs": pick.choice((None, 0, 2, 99)),
        "prompt_logprobs": pick.choice((None, None, None, 0, 3, 99)),
    }
    rules = random_rules(pick)
    if "bad_words_token_ids" not in rules and "allowed_token_ids" not in rules:  # together they may leave nothing
        fields["structured_outputs"] = pick.choice((None, FORM))
    if pick.random() < 0.5:
        return SamplingParams(temperature=0.0, ignore_eos=pick.random() < 0.5, **fields)
    return SamplingParams(
        temperature=pick.choice((0.5, 1.0)),
        top_k=pick.choice((0, 5)),
        repetition_penalty=pick.choice((1.0, 1.4)),
        presence_penalty=pick.choice((0.0, 0.7)),
        min_tokens=pick.randrange(count + 1),
        stop_token_ids=pick.sample(range(VOCAB), 2),
        **rules,
        **fields,
    )


def random_rules(pick: random.Random) -> dict[str, Any]:
    """Bias, allowed tokens and banned words that come up among so few tokens."""
    rules: dict[str, Any] = {}
    if pick.random() < 0.3:
        rules["logit_bias"] = {pick.randrange(VOCAB): pick.choice((-3.0, 0.7, 500.0)) for _ in range(3)}
    if pick.random() < 0.3:
        rules["allowed_token_ids"] = pick.sample(range(VOCAB), 6)
    if pick.random() < 0.5:
        rules["bad_words_token_ids"] = [
            [pick.randrange(VOCAB) for _ in range(pick.choice((1, 2, 2, 2, 3)))] for _ in range(60)
        ]
    return rules


class Run:
    """An engine, and requests at random until all have ended."""

    def __init__(self, seed: int, captured: bool) -> None:
        self.pick = pick = random.Random(seed)
        max_num_seqs, max_tokens = pick.choice((2, 4, 7)), pick.choice((5, 12, 40))
        self.pages = PageManager(pick.choice((10, 14, 30)), PAGE_SIZE, caching=pick.random() < 0.7)
        self.pool = KVPool(KVLayout(1, 1, 2, PAGE_SIZE, torch.float32), self.pages.num_pages, torch.device("cpu"))
        self.pool.pages.fill_(torch.nan)
        model: Any = PageReader()
        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_tokens, "max_model_len": CONTEXT}
        policy = pick.choice((DecodePolicy(), DecodePolicy(mixed_chunk_tokens=2), THROUGHPUT))
        chunk, full = policy.prefill_budget(max_tokens, 1), policy.prefill_budget(max_tokens, 0)
        runner = DeviceRunner(model, self.pool, **limits, mixed_chunk_tokens=chunk, prompt_step_tokens=full)
        if captured:
            capture(runner)
        forms: Any = FakeConstraints(VOCAB, pick)
        scheduler = Scheduler(self.pages, policy, hash_scope="", **limits)
        self.engine = Engine(scheduler, runner, clock=lambda: 0.0, constraints=forms)
        self.sources: dict[str, GenerateRequest] = {}
        self.found: dict[str, tuple[list[int], list[TokenLogprobs | None]]] = {}
        self.ended: set[str] = set()
        self.prompt_scores: dict[str, tuple[TokenLogprobs, ...]] = {}

    def add(self) -> None:
        """A new prompt, a part of one that was there, or a hand-off whose pages have been filled elsewhere."""
        pick, name = self.pick, str(len(self.sources))
        prompt = [pick.randrange(VOCAB) for _ in range(pick.choice((1, 1, 2, 3, 4, 5, 8, 9, 13, CONTEXT - 1)))]
        if self.sources and pick.random() < 0.4:
            earlier = pick.choice(list(self.sources.values())).prompt_token_ids
            prompt = [*earlier[: pick.randrange(len(earlier) + 1)], *prompt][: CONTEXT - 1]
        source = GenerateRequest(
            request_id=name, prompt_token_ids=prompt, sampling=random_sampling(pick), eos_token_ids=[EOS]
        )
        computed, key = 0, request_key(name, 0, 0)
        if pick.random() < 0.3 and len(prompt) < CONTEXT - 1:
            tokens, _ = expected(source)
            pages = self.pages.pages_for(len(prompt) + 1)
            if len(tokens) > 1 and pages <= self.pages.num_available:
                computed = len(prompt)
                source = msgspec.structs.replace(source, output_token_ids=tokens[:1])
                for index, page in enumerate(self.pages.allocate(key, pages)):
                    for slot, token in enumerate(prompt[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]):
                        position = index * PAGE_SIZE + slot
                        self.pool.pages[page, 0, 0, 0, slot] = torch.tensor([token, position]).float()
        assert self.engine.add(source, computed=computed) == key
        self.sources[key] = source
        self.found[key] = (list(source.output_token_ids), [])

    def step(self) -> None:
        for output in self.engine.step().outputs:
            tokens, logprobs = self.found[output.key]
            assert output.index == len(tokens)
            tokens += output.token_ids
            logprobs += output.logprobs or [None] * len(output.token_ids)
            if output.prompt_logprobs is not None:
                assert output.index == 0 and output.key not in self.prompt_scores
                self.prompt_scores[output.key] = output.prompt_logprobs
            if output.finish is not None:
                self.ended.add(output.key)
        self.pages.check()

    def until_all_have_ended(self, count: int) -> None:
        aborted = set()
        for _ in range(2000):
            if len(self.sources) < count and self.pick.random() < 0.6:
                self.add()
            self.step()
            if self.pick.random() < 0.03 and (open_ := self.sources.keys() - self.ended - aborted):
                key = self.pick.choice(sorted(open_))
                aborted.add(key)
                self.engine.scheduler.abort(key)
            if len(self.sources) == count and not self.engine.has_work():
                break
        assert self.pages.num_held == 0
        assert self.ended == self.sources.keys() - aborted
        for key, source in self.sources.items():
            tokens, logprobs = expected(source)
            got = self.found[key]
            assert got[0] == (tokens if key in self.ended else tokens[: len(got[0])]), (key, source)
            for mine, theirs in zip(got[1], logprobs, strict=False):
                compare(mine, theirs)
            if source.wants_prompt_logprobs and (got[0] or key in self.prompt_scores):  # its rules may leave no token
                compare_prompt(self.prompt_scores.pop(key), source)
        assert not self.prompt_scores, "scores that nobody asked for"


def compare_prompt(mine: Sequence[TokenLogprobs], source: GenerateRequest) -> None:
    prompt, top = source.prompt_token_ids, source.sampling.prompt_logprobs or 0
    assert len(mine) == len(prompt) - 1
    for at, found in enumerate(mine, start=1):
        logits = scores(prompt[:at])
        logprobs = logits.log_softmax(0)
        assert found.logprob == pytest.approx(logprobs[prompt[at]].item(), abs=1e-4)
        assert found.rank == int((logits > logits[prompt[at]]).sum()) + 1
        assert found.top_ids == logits.topk(min(top, VOCAB)).indices.tolist()


def compare(mine: TokenLogprobs | None, theirs: TokenLogprobs | None) -> None:
    assert (mine is None) == (theirs is None)
    if mine is not None and theirs is not None:
        assert (mine.rank, list(mine.top_ids)) == (theirs.rank, list(theirs.top_ids))
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that some steps fit and others do not."""
    monkeypatch.setattr(mixed_steps, "_PROMPT_TOKENS", (4, 8, 16))
    monkeypatch.setattr(mixed_steps, "MAX_PROMPTS", 3)


@pytest.mark.parametrize("captured", [False, True], ids=["op by op", "captured"])
@pytest.mark.parametrize("seed", range(7))
def test_random_requests(seed: int, captured: bool, small_shapes: None) -> None:
    run = Run(seed, captured)
    run.until_all_have_ended(25)


def test_keys_come_back_in_other_slots() -> None:
    """Two sequences end and start again, each in the other's slot, with one token to compute: as after preemption."""
    pool = KVPool(KVLayout(1, 1, 2, PAGE_SIZE, torch.float32), 4, torch.device("cpu"))
    model: Any = PageReader()
    runner = DeviceRunner(model, pool, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=CONTEXT)
    texts = {"a": [5, 6, 7], "b": [11, 12, 13]}
    greedy = SamplingParams(temperature=0.0)

    def step(number: int, ended: tuple[str, ...], begin: int) -> None:
        """Compute what is known from `begin` on, and sample."""
        started = tuple(SequenceStart(key, tuple(texts[key]), 3, greedy, 0, ()) for key in ended or texts)
        work = tuple(
            SequenceWork(key, begin, len(text) - begin, (page,), True) for page, (key, text) in enumerate(texts.items())
        )
        wanted = {key: int(scores(text).argmax()) for key, text in texts.items()}
        result = runner.submit(StepPlan(number, ended, started, work)).result()
        assert {item.key: item.token_ids[0] for item in result.sampled} == wanted
        for key, token in wanted.items():
            texts[key].append(token)

    step(1, (), 0)
    step(2, ("a", "b"), 3)
    del texts["a"][-1], texts["b"][-1]
    step(3, ("a", "b"), 3)


@pytest.mark.parametrize("before", [True, False], ids=["before the device began", "after"])
def test_steps_that_fail_leave_no_later_step_with_the_tokens_of_another(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = KVPool(KVLayout(1, 1, 2, PAGE_SIZE, torch.float32), 4, torch.device("cpu"))
    model: Any = PageReader()
    runner = DeviceRunner(model, pool, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=CONTEXT)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def step(number: int, prompt: list[int]) -> StepPlan:
        start = SequenceStart(str(number), tuple(prompt), len(prompt), SamplingParams(temperature=0.0), 0, ())
        work = SequenceWork(str(number), 0, len(prompt), (0,), True)
        return StepPlan(number, (str(number - 1),), (start,), (work,))

    number = 0
    for prompt in ([5], [6, 7], [8], [9, 10]):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(*((runner, "_apply_changes") if before else (model, "logits")), out_of_memory)
            runner.submit(step(number := number + 1, prompt))
        result = runner.submit(step(number := number + 1, prompt)).result()
        assert [item.token_ids[0] for item in result.sampled] == [int(scores(prompt).argmax())]
