"""What a step changed, for the roles of the workers and for `LLM`."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from penstock.common.histogram import STEP_TOKENS, Histogram
from penstock.common.messages import Finish, GenerateRequest, Spans, TokenLogprobs

HANDED_OFF = Finish(reason="handoff")
"""End of a request on a prefill worker: its pages stay held by its key, for the hand-off to release."""

NOTHING_ALLOWED = Finish(
    reason="error",
    code="invalid_request",
    message="allowed_token_ids, bad_words, min_tokens and structured_outputs together leave no token to go on with",
)
"""End of a request whose rules and form exclude every token."""


class Output(msgspec.Struct, frozen=True, gc=False):
    """New tokens of one request; `index` counts output tokens, those of earlier attempts included."""

    request: GenerateRequest
    key: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish: Finish | None
    spans: Spans | None  # with the first and the last output
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # with the first output, if asked for


class Progress(msgspec.Struct, frozen=True, gc=False):
    """The K/V of the first `computed` tokens of a request are in its pages now."""

    key: str
    computed: int


@dataclass(frozen=True)
class StepOutput:
    """What a step changed, in plan order. Progress is told where pages are handed off: under a prefill-only policy."""

    outputs: tuple[Output, ...] = ()
    progress: tuple[Progress, ...] = ()


@dataclass
class SchedulerCounters:
    """Since the start of the worker."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))
