"""How fast a worker works: what turns tokens, bytes and sequences into milliseconds. Pure.

The routing policy weighs choices with these, and the fleet simulator runs its virtual workers on them. The defaults are
fitted to the recorded runs of Llama-3.1-8B's shape on one H200 (benchmarks/results/h200-6dff87d.json): prompts of 8192
tokens, and decode steps of 1 to 256 sequences with contexts of 1024 to 8192 tokens. The link is one 400 Gbit/s card,
less a fifth. Only their ratios decide where a request goes. Workers measure their own and report them in heartbeats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import msgspec

from penstock.common.messages import MeasuredRates


@dataclass(frozen=True)
class WorkerRates:
    """Rates of one worker. A decode step reads the weights once, and each sequence's keys and values."""

    prefill_tokens_per_s: float = 39_600.0
    decode_step_ms: float = 4.4
    decode_sequence_ms: float = 0.011
    decode_context_ms: float = 3.2e-5  # a token of context, a step
    link_bytes_per_s: float = 40e9
    link_setup_ms: float = 2.0  # asking a worker for pages, until the first byte moves
    prefill_step_ms: float = 0.0  # of a prompt's computation, beside its tokens

    def __post_init__(self) -> None:
        for rate in fields(self):
            value = getattr(self, rate.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{rate.name} must be a number of at least 0, got {value}")
        if not self.prefill_tokens_per_s or not self.link_bytes_per_s or not self.decode_step_ms:
            raise ValueError("a worker without speed never ends: rates and decode_step_ms must be above 0")

    def prefill_ms(self, tokens: float) -> float:
        """Computing so many tokens of prompts."""
        return self.prefill_step_ms + tokens * 1e3 / self.prefill_tokens_per_s if tokens > 0 else 0.0

    def move_ms(self, size_bytes: float) -> float:
        """Reading pages from another worker."""
        return self.link_setup_ms + size_bytes * 1e3 / self.link_bytes_per_s

    def mixed_ms(self, tokens: float, chunk_tokens: int, sequences: float, context_tokens: float) -> float:
        """Computing so many tokens of prompts in steps of `chunk_tokens` that also move these sequences on."""
        chunks = math.ceil(tokens / chunk_tokens)
        step_ms = self.prefill_step_ms + self.sequences_ms(sequences, context_tokens)
        return chunks * step_ms + tokens * 1e3 / self.prefill_tokens_per_s

    def step_ms(self, sequences: float, context_tokens: float) -> float:
        """One decode step of so many sequences with so many tokens of context between them."""
        return self.decode_step_ms + self.sequences_ms(sequences, context_tokens)

    def sequences_ms(self, sequences: float, context_tokens: float) -> float:
        """What these sequences add to a step."""
        return self.decode_sequence_ms * sequences + self.decode_context_ms * context_tokens

    def output_ms(self, prompt_tokens: int, output_tokens: int) -> float:
        """What one sequence adds to all the steps that it is part of; its first token comes with its prompt."""
        return max(0, output_tokens - 1) * self.sequences_ms(1, prompt_tokens + output_tokens / 2)


H200_LLAMA8B = WorkerRates()


def measured(reported: MeasuredRates, otherwise: WorkerRates) -> WorkerRates:
    """The rates that a worker has measured; `otherwise` has those that it has not (yet)."""
    known: dict[str, float] = {}
    for deciding, names in _TOGETHER.items():
        if getattr(reported, deciding) > 0:
            known |= {name: getattr(reported, name) for name in names}
    return replace(otherwise, **known) if known else otherwise


def typical(reported: Iterable[MeasuredRates], otherwise: WorkerRates = H200_LLAMA8B) -> WorkerRates:
    """What to take for a worker that has measured nothing: the mean of those that have, else `otherwise`.

    A default in between would make a new worker of a slow fleet look idle for ever, and of a fast one useless.
    """
    rows = list(reported)
    mean: dict[str, float] = {}
    for deciding, names in _TOGETHER.items():
        known = [row for row in rows if getattr(row, deciding) > 0]
        mean |= {name: sum(getattr(row, name) for row in known) / len(known) for name in names if known}
    return measured(msgspec.convert(mean, MeasuredRates), otherwise)


_TOGETHER = {  # measured together, as the first of them tells
    "prefill_tokens_per_s": ("prefill_tokens_per_s", "prefill_step_ms"),
    "decode_step_ms": ("decode_step_ms", "decode_sequence_ms", "decode_context_ms"),
    "link_bytes_per_s": ("link_bytes_per_s", "link_setup_ms"),
}
