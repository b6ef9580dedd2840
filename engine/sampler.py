"""From logits to tokens. One call a step for all sequences that sample; every row's result depends on that row only.

Order, as vLLM's: raw logprobs, bias and bans, min_tokens, penalties, what the output's form allows, then greedy, or
temperature, min-p, top-k, top-p and the draw.
The noise of a draw is a pure function of (request seed, choice) and (token position, purpose, token id): it does not
depend on batch, worker, chunking or preemption, so a request can move or be replayed and still draw the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from penstock.common.messages import TokenLogprobs
from penstock.common.sampling import SamplingParams
from penstock.engine.token_rules import TokenRules
from penstock.kernels.filters import NEVER, apply_penalties, filter_min_p, filter_top_k_top_p
from penstock.kernels.philox import exponential_noise
from penstock.kernels.token_mask import forbid_others

PURPOSE_SAMPLE = 0


@dataclass(frozen=True)
class SamplingRow:
    """What the sampler must know of one sequence."""

    sampling: SamplingParams
    noise_seed: int  # from `noise_seed(seed, choice)`
    tokens: Sequence[int]  # prompt and output so far; the next one is sampled for position len(tokens)
    prompt_len: int
    forbidden_until_min: tuple[int, ...]  # tokens that would end the request

    @property
    def needs_logits_changed(self) -> bool:
        s = self.sampling
        return (
            s.repetition_penalty != 1.0
            or s.frequency_penalty != 0.0
            or s.presence_penalty != 0.0
            or self.below_min_tokens
            or self.rules is not None
        )

    @cached_property
    def rules(self) -> TokenRules | None:
        return TokenRules.of(self.sampling)

    @property
    def below_min_tokens(self) -> bool:
        return bool(self.forbidden_until_min) and len(self.tokens) - self.prompt_len < self.sampling.min_tokens


def noise_seed(seed: int | None, choice: int) -> int:
    """The 64-bit key of a choice's noise, as a signed integer."""
    digest = blake2b(f"{seed or 0}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], masks: Mapping[int, bytes] | None = None
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Next token of each row and, where asked for, its logprobs.

    logits: `[len(rows), vocab]` float32; not changed. masks: of rows that may only get certain tokens
    (kernels/token_mask.py).
    """
    masks = masks or {}
    processed = logits
    for i, row in enumerate(rows):
        if row.needs_logits_changed or i in masks:
            if processed is logits:
                processed = logits.clone()
            _change_logits(processed[i], row)
    for i, mask in masks.items():
        words = torch.from_numpy(np.frombuffer(bytearray(mask), dtype=np.int32))
        forbid_others(processed[i], words.to(logits.device))
    tokens = processed.argmax(dim=-1)
    random = [i for i, row in enumerate(rows) if not row.sampling.greedy]
    if random:
        index = torch.tensor(random, device=logits.device)
        tokens[index] = draw_scores(processed[index], [rows[i] for i in random]).argmax(dim=-1)
    chosen = tokens.tolist()
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    asked = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    if asked:
        index = torch.tensor(asked, device=logits.device)
        found = token_logprobs(logits[index], tokens[index], [rows[i].sampling.logprobs or 0 for i in asked])
        for i, item in zip(asked, found, strict=True):
            logprobs[i] = item
    return chosen, logprobs


def _change_logits(logits: Tensor, row: SamplingRow) -> None:
    rules = row.rules
    if rules is not None:
        if rules.has_bias:
            logits += rules.bias_row(len(logits)).to(logits.device)
        for token in rules.completing(row.tokens, row.prompt_len):
            if token < len(logits):
                logits[token] = NEVER
    if row.below_min_tokens:
        logits[list(row.forbidden_until_min)] = NEVER
    s = row.sampling
    if s.repetition_penalty != 1.0 or s.frequency_penalty != 0.0 or s.presence_penalty != 0.0:
        tokens = torch.tensor(row.tokens, device=logits.device)
        apply_penalties(
            logits,
            tokens[: row.prompt_len],
            tokens[row.prompt_len :],
            repetition=s.repetition_penalty,
            frequency=s.frequency_penalty,
            presence=s.presence_penalty,
        )


def draw_scores(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Filtered logits with Gumbel noise, `[len(rows), vocab]`: the largest of a row is its draw."""
    vocab = logits.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)

    params = [row.sampling for row in rows]
    logits = logits / column([p.effective_temperature for p in params])[:, None]
    if any(p.min_p > 0.0 for p in params):
        logits = filter_min_p(logits, column([p.min_p for p in params]))
    if any(p.top_k > 0 or p.top_p < 1.0 for p in params):
        top_k = torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=logits.device)
        logits = filter_top_k_top_p(logits, top_k, column([p.top_p for p in params]))
    seeds = torch.tensor([row.noise_seed for row in rows], device=logits.device)
    positions = torch.tensor([len(row.tokens) for row in rows], device=logits.device)
    noise = exponential_noise(seeds, positions, PURPOSE_SAMPLE, vocab)
    return logits - noise.log()


def token_logprobs(logits: Tensor, tokens: Tensor, top: Sequence[int]) -> list[TokenLogprobs]:
    """Logprobs of tokens `[n]` under logits `[n, vocab]`, each with as many of the likeliest as `top` says."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(-1, tokens[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    values, ids = logprobs.topk(min(max(top), logprobs.shape[-1]), dim=-1)
    return [
        TokenLogprobs(logprob, rank, row_ids[:k], row_values[:k])
        for logprob, rank, row_ids, row_values, k in zip(
            chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), top, strict=True
        )
    ]
