"""Batch policies: the one place where prefill and decode workers schedule differently. Pure."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol

from penstock.common.mixed_chunk import chunk_beside

_ALONE = 4  # times as many prompt tokens in a step that only computes prompts


class BatchPolicy(Protocol):
    """How a step's token budget is spent."""

    @property
    def prefill_only(self) -> bool:
        """Requests end after their first token; their pages are handed off."""
        ...

    @property
    def gather_share(self) -> float:
        """Above 0, prompts wait to join a batch that decodes until `enough_gathered`."""
        ...

    def prefill_budget(self, max_num_batched_tokens: int, decode_tokens: int) -> int:
        """Prompt tokens that may be computed in a step that also computes `decode_tokens` for sequences that decode."""
        ...

    def lone_chunk(self, max_num_batched_tokens: int, budget: int, left: int, moved_per_token: float) -> int:
        """How many tokens of a prompt, of which `left` are still to be computed, go into a step that has nothing before
        it, and `budget` tokens if it goes on with others. moved_per_token: as in `Request`."""
        ...


@dataclass(frozen=True)
class PrefillPolicy:
    """A prefill worker: short steps, but for the beginnings of long prompts.

    Steps of `step_tokens` keep a GPU nearly as busy as longer ones (llama8b on an H200: 23 us a token), prompts that
    come together end one after the other, not all at the last one's end, and all pages of a prompt but those of its
    last step move while it is being computed. Before its last step a long prompt has the worker to itself, since who
    came later waits for its end anyway: one long step is shorter than many (by 4 % for 8192 tokens). It is as long as
    its pages take to move beside the last step at most; so there is none over a slow link, or one not measured yet.
    """

    prefill_only: bool = True
    gather_share: float = 0.0
    step_tokens: int = 2048

    def prefill_budget(self, max_num_batched_tokens: int, decode_tokens: int) -> int:
        return min(self.step_tokens, max_num_batched_tokens) - decode_tokens

    def lone_chunk(self, max_num_batched_tokens: int, budget: int, left: int, moved_per_token: float) -> int:
        moved = int(min(max_num_batched_tokens, moved_per_token * self.step_tokens))
        return min(left, max(budget, min(left - self.step_tokens, moved)))


@dataclass(frozen=True)
class DecodePolicy:
    """A decode worker: decodes come first; prompts fill what is left.

    While few sequences decode, a step computes at most `mixed_chunk_tokens` prompt tokens (None: a quarter of the
    budget), while many do, some more (common/mixed_chunk.py), so that a long prompt stretches the gap between two
    tokens by a bounded time only. Alone, prompts get four times as much: a hand-off that lands meanwhile waits for the
    step.
    """

    prefill_only: bool = False
    mixed_chunk_tokens: int | None = None
    gather_share: float = 0.0

    def prefill_budget(self, max_num_batched_tokens: int, decode_tokens: int) -> int:
        chunk = self.mixed_chunk_tokens
        if decode_tokens == 0:
            return max_num_batched_tokens if chunk is None else min(_ALONE * chunk, max_num_batched_tokens)
        chunk = chunk_beside(chunk or max(1, max_num_batched_tokens // _ALONE), decode_tokens)
        return min(chunk, max(0, max_num_batched_tokens - decode_tokens))

    def lone_chunk(self, max_num_batched_tokens: int, budget: int, left: int, moved_per_token: float) -> int:
        return min(left, budget)


THROUGHPUT = DecodePolicy(mixed_chunk_tokens=sys.maxsize, gather_share=1 / 16)
"""For work that is there from the start and of which only the end counts: whole steps, as few mixed ones as pay."""


def enough_gathered(share: float, *, num_decodes: int, joining: int, left_waiting: int, fills_a_step: bool) -> bool:
    """Whether `joining` prompts, all that have room now, are worth a step that is not decode only.

    Such a step costs c times a decode step more than its tokens do, whether one prompt joins or many; a slot left empty
    until then costs a token a step. If a batch of B sequences loses r a step, waiting for n steps costs
    r n / 2 + c B / n tokens a step, least for n = sqrt(2 c B / r), when sqrt(2 c r / B) of the batch has gone: 5 % with
    c = 0.3 and outputs of 250 tokens, 7 % with 128. Nothing is gained by waiting for more than a step computes, nor
    when nothing is left to wait for.
    """
    return joining >= share * (num_decodes + joining) or fills_a_step or left_waiting == 0
