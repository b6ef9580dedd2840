"""How fast a worker really is, from the steps and reads that it has just done: what heartbeats tell routers. Pure.

A step is modelled as

    ms = base + prompt (if it computes some) + tokens of prompts + sequences + tokens of context

each with a coefficient, found by least squares in which a step weighs half after `HALF_LIFE` more; a read of pages as
setup + bytes. Where steps are too much alike to tell these apart, a prompt's time is its tokens' (else prompts of one
length would seem to cost hardly more together than alone), and a read's its bytes'. Nothing is told before there are
enough of a kind, so that a router can go on with what it knows of others (router/rates.py).
"""

from __future__ import annotations

from penstock.common.least_squares import RIDGE, LeastSquares
from penstock.common.messages import MeasuredRates

HALF_LIFE = 500.0  # steps, reads
WARM_UP_STEPS = 16  # not counted: the first ones compile kernels and touch memory for the first time
ENOUGH_STEPS = 8  # with a prompt, and without one
ENOUGH_READS = 4
_ELSE = 100 * RIDGE  # of what tokens and bytes are not told from


class RateEstimator:
    """One worker's rates. Used in the loop's thread."""

    def __init__(self) -> None:
        self._steps = LeastSquares(5, HALF_LIFE, (_ELSE, _ELSE, RIDGE, _ELSE, _ELSE))
        self._reads = LeastSquares(2, HALF_LIFE, (_ELSE, RIDGE))
        self._seen = 0
        self._prompts = 0
        self._decodes = 0
        self._solved_at = (0, 0)
        self._rates = MeasuredRates()

    def step(self, num_tokens: int, sequences: int, context_tokens: int, seconds: float) -> None:
        """A step computed `num_tokens` tokens of `sequences` sequences, whose pages held `context_tokens` tokens."""
        self._seen += 1
        if self._seen <= WARM_UP_STEPS:
            return
        prompt_tokens = num_tokens - sequences  # each sequence has one token at least, be it of a prompt
        if prompt_tokens > 0:
            self._prompts += 1
        else:
            self._decodes += 1
        x = (1.0, float(prompt_tokens > 0), float(prompt_tokens), float(sequences), float(context_tokens))
        self._steps.observe(x, seconds * 1e3)

    def read(self, size_bytes: int, seconds: float) -> None:
        """So many bytes of pages came from another worker."""
        self._reads.observe((1.0, float(size_bytes)), seconds * 1e3)

    def rates(self) -> MeasuredRates:
        """What is known as of now; fields that are not known are 0."""
        at = (self._steps.observations, self._reads.observations)
        if at != self._solved_at:
            self._solved_at = at
            self._rates = self._measure()
        return self._rates

    def _measure(self) -> MeasuredRates:
        prefill_rate = prefill_step = decode_step = sequence = context = link_rate = link_setup = 0.0
        if max(self._prompts, self._decodes) >= ENOUGH_STEPS:
            base, prompt, token, sequence_ms, context_ms = self._steps.solve()
            if self._prompts >= ENOUGH_STEPS and token > 0:
                prefill_rate, prefill_step = 1e3 / token, base + prompt
            if self._decodes >= ENOUGH_STEPS:
                decode_step, sequence, context = base, sequence_ms, context_ms
        if self._reads.observations >= ENOUGH_READS:
            link_setup, byte_ms = self._reads.solve()
            link_rate = 1e3 / byte_ms if byte_ms > 0 else 0.0
        return MeasuredRates(
            prefill_tokens_per_s=prefill_rate,
            prefill_step_ms=prefill_step,
            decode_step_ms=decode_step,
            decode_sequence_ms=sequence,
            decode_context_ms=context,
            link_bytes_per_s=link_rate,
            link_setup_ms=link_setup,
        )
