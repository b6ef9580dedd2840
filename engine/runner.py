"""Runs step plans on a model in this process: the `Executor` for one device.

Remembers each sequence's tokens and page table between steps, builds the step's inputs, runs the model over the KV pool
and samples. What it appends itself is never sent to it again (see plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.common.messages import TokenLogprobs
from penstock.engine.kv_pool import KVPool
from penstock.engine.plan import (
    PromptScores,
    SampledTokens,
    SequenceStart,
    StepHandle,
    StepPlan,
    StepResult,
    scored_positions,
)
from penstock.engine.sampler import SamplingRow, noise_seed, sample, token_logprobs
from penstock.kernels.paged_batch import PagedBatch
from penstock.models.decoder import CausalLM

_SCORED_AT_ONCE = 64  # prompt tokens: their logits are as many rows of the vocabulary


@dataclass
class _Sequence:
    tokens: list[int]
    table: list[int]
    row: SamplingRow
    scores_prompt: bool


@dataclass(frozen=True)
class _Done:
    """A step that ran to its end inside `submit`."""

    value: StepResult

    def done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def result(self) -> StepResult:
        return self.value


class ModelRunner:
    """One model, one pool, one device; steps run inside `submit`."""

    run_ahead = 0

    def __init__(self, model: CausalLM, pool: KVPool) -> None:
        self.model = model
        self.pool = pool
        self._kv = pool.layers()
        self._sequences: dict[str, _Sequence] = {}

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> StepHandle:
        """Run the step. Raises what the model raises (out of memory, say): the sequences' state is then undefined."""
        for key in plan.ended:
            self._sequences.pop(key, None)
        for start in plan.started:
            self._sequences[start.key] = _new_sequence(start)
        return _Done(StepResult(plan.step, *self._run(plan)))

    def close(self) -> None:
        self._sequences.clear()
        self.pool.close()

    def _run(self, plan: StepPlan) -> tuple[tuple[SampledTokens, ...], tuple[PromptScores, ...]]:
        if not plan.work:
            return (), ()
        sequences = [self._sequences[work.key] for work in plan.work]
        token_ids: list[int] = []
        sampling: list[_Sequence] = []
        for sequence, work in zip(sequences, plan.work, strict=True):
            sequence.table.extend(work.new_pages)
            token_ids += sequence.tokens[work.start : work.start + work.num_tokens]
            if work.samples:
                sampling.append(sequence)
        device = self.pool.device
        batch = PagedBatch.build(
            [work.num_tokens for work in plan.work],
            [work.start + work.num_tokens for work in plan.work],
            [sequence.table for sequence in sequences],
            self.pool.layout.page_size,
            device,
        )
        # A decode step has no other tokens than the last ones.
        prompts = len(token_ids) > len(plan.work)
        scores = any(sequence.scores_prompt for sequence in sequences)
        last_tokens = batch.last_rows if prompts and not scores else None
        hidden = self.model.forward(torch.tensor(token_ids, device=device), batch, self._kv, last_tokens)
        prompt_scores: tuple[PromptScores, ...] = ()
        if scores:
            prompt_scores = self._score_prompts(plan, sequences, hidden)
            hidden = hidden[batch.last_rows]
        if not sampling:
            return (), prompt_scores
        if len(sampling) < len(sequences):
            hidden = hidden[[i for i, work in enumerate(plan.work) if work.samples]]
        logits = self.model.logits(hidden).float()
        works = [work for work in plan.work if work.samples]
        masks = {i: work.mask for i, work in enumerate(works) if work.mask is not None}
        tokens, logprobs = sample(logits, [sequence.row for sequence in sampling], masks)
        keys = [work.key for work in works]
        results = []
        for key, sequence, token, logprob in zip(keys, sampling, tokens, logprobs, strict=True):
            sequence.tokens.append(token)
            results.append(SampledTokens(key, (token,), None if logprob is None else (logprob,)))
        return tuple(results), prompt_scores

    def _score_prompts(self, plan: StepPlan, sequences: list[_Sequence], hidden: Tensor) -> tuple[PromptScores, ...]:
        """hidden: `[T, hidden]`, of all tokens of the step."""
        found: list[PromptScores] = []
        first_row = 0
        for work, sequence in zip(plan.work, sequences, strict=True):
            positions = scored_positions(work, sequence.row.prompt_len) if sequence.scores_prompt else range(0)
            scored: list[TokenLogprobs] = []
            for start in range(0, len(positions), _SCORED_AT_ONCE):
                part = positions[start : start + _SCORED_AT_ONCE]
                rows = hidden[first_row + part.start - work.start : first_row + part.stop - work.start]
                targets = torch.tensor(sequence.tokens[part.start + 1 : part.stop + 1], device=hidden.device)
                top = sequence.row.sampling.prompt_logprobs or 0
                scored += token_logprobs(self.model.logits(rows).float(), targets, [top] * len(part))
            if scored:
                found.append(PromptScores(work.key, positions.start + 1, tuple(scored)))
            first_row += work.num_tokens
        return tuple(found)


def _new_sequence(start: SequenceStart) -> _Sequence:
    tokens = list(start.tokens)
    sampling = start.sampling
    eos = () if sampling.ignore_eos else start.eos_token_ids
    row = SamplingRow(
        sampling=sampling,
        noise_seed=noise_seed(sampling.seed, start.choice),
        tokens=tokens,  # shared with the sequence: it grows
        prompt_len=start.prompt_len,
        forbidden_until_min=tuple({*eos, *sampling.stop_token_ids}) if sampling.min_tokens else (),
    )
    return _Sequence(tokens, [], row, start.scores_prompt)
