"""Filters and penalties on logits: plain PyTorch. Masked tokens get -inf; every op works row by row."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = float("-inf")


def apply_penalties(
    logits: Tensor,  # [vocab] float32, changed in place
    prompt: Tensor,  # [P] int64
    output: Tensor,  # [O] int64
    *,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """Repetition (prompt, output; Keskar et al. 2019), frequency and presence (output only; OpenAI's API reference)."""
    if repetition != 1.0:
        seen = torch.cat([prompt, output]).unique()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / repetition, values * repetition)
    if (frequency != 0.0 or presence != 0.0) and output.numel():
        seen, counts = output.unique(return_counts=True)
        logits[seen] -= frequency * counts + presence


def filter_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens less likely than min_p times the likeliest. logits [N, vocab], min_p [N]; 0 keeps all."""
    floor = logits.amax(dim=-1, keepdim=True) + torch.log(min_p)[:, None]
    return logits.masked_fill(logits < floor, NEVER)


def filter_top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the top_k likeliest, then of those the fewest whose probabilities reach top_p (Holtzman et al. 2020).

    logits [N, vocab]; top_k [N] int64 (vocab: off); top_p [N] (1: off). Ties are broken by token id, so that the result
    does not depend on how the sort is done. The likeliest token always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(rank[None, :] >= top_k[:, None], NEVER)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (rank > 0)[None, :] & (top_p < 1.0)[:, None], NEVER)
    return torch.empty_like(logits).scatter_(-1, order, ordered)
