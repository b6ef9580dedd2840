"""How fast a worker works: what turns tokens, bytes and sequences into milliseconds. Pure.

The routing policy weighs choices with these, and the fleet simulator runs its virtual workers on them. The defaults are
fitted to the recorded runs of Llama-3.1-8B's shape on one H200 (benchmarks/results/h200-9d1d2bf.json): prompts of 8192
tokens, and decode steps of 1 to 256 sequences with contexts of 1024 to 8192 tokens. The link is one 400 Gbit/s card,
less a fifth. Only their ratios decide where a request goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class WorkerRates:
    """Rates of one worker. A decode step reads the weights once, and each sequence's keys and values."""

    prefill_tokens_per_s: float = 39_600.0
    decode_step_ms: float = 4.4
    decode_sequence_ms: float = 0.011
    decode_context_ms: float = 3.2e-5  # a token of context, a step
    link_bytes_per_s: float = 40e9
    link_setup_ms: float = 2.0  # asking a worker for pages, until the first byte moves

    def __post_init__(self) -> None:
        for rate in fields(self):
            value = getattr(self, rate.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{rate.name} must be a number of at least 0, got {value}")
        if not self.prefill_tokens_per_s or not self.link_bytes_per_s or not self.decode_step_ms:
            raise ValueError("a worker without speed never ends: rates and decode_step_ms must be above 0")

    def prefill_ms(self, tokens: float) -> float:
        """Computing so many tokens of prompts."""
        return tokens * 1e3 / self.prefill_tokens_per_s

    def move_ms(self, size_bytes: float) -> float:
        """Reading pages from another worker."""
        return self.link_setup_ms + size_bytes * 1e3 / self.link_bytes_per_s

    def step_ms(self, sequences: float, context_tokens: float) -> float:
        """One decode step of so many sequences with so many tokens of context between them."""
        return self.decode_step_ms + self.sequences_ms(sequences, context_tokens)

    def sequences_ms(self, sequences: float, context_tokens: float) -> float:
        """What these sequences add to a step."""
        return self.decode_sequence_ms * sequences + self.decode_context_ms * context_tokens


H200_LLAMA8B = WorkerRates()
