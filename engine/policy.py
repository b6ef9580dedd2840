"""Batch policies: the one place where prefill and decode workers schedule differently. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class BatchPolicy(Protocol):
    """How a step's token budget is spent."""

    @property
    def prefill_only(self) -> bool:
        """Requests end after their first token; their pages are handed off."""
        ...

    def prefill_budget(self, max_num_batched_tokens: int, num_decodes: int) -> int:
        """Prompt tokens that may be computed in a step that also decodes `num_decodes` sequences."""
        ...


@dataclass(frozen=True)
class PrefillPolicy:
    """A prefill worker: whole steps of prompt tokens."""

    prefill_only: bool = True

    def prefill_budget(self, max_num_batched_tokens: int, num_decodes: int) -> int:
        return max_num_batched_tokens


@dataclass(frozen=True)
class DecodePolicy:
    """A decode worker: decodes come first; prompts fill what is left.

    While sequences decode, a step computes at most 1/`smoothing` of the budget in prompt tokens, so that a long prompt
    stretches the gap between two tokens by a bounded time only. Alone, prompts get the whole budget.
    """

    prefill_only: bool = False
    smoothing: int = 4

    def prefill_budget(self, max_num_batched_tokens: int, num_decodes: int) -> int:
        if num_decodes == 0:
            return max_num_batched_tokens
        return min(max(1, max_num_batched_tokens // self.smoothing), max(0, max_num_batched_tokens - num_decodes))
