"""What passes between scheduler and executor: a plan of one step, and what came out of it.

Plans carry changes, not state: the executor remembers each sequence's tokens and page table, and appends what it
samples itself, so that the next step can be submitted before this one's tokens have been read, and so that a plan's
size does not grow with the tokens already produced. Ranks of a parallel executor all get the same plan.

What is made once a sequence and step is a `msgspec.Struct` without garbage collection: a few times cheaper to make than
a dataclass, and a step of 256 sequences does not set the collector off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from penstock.common.messages import TokenLogprobs
from penstock.common.sampling import SamplingParams


@dataclass(frozen=True)
class SequenceStart:
    """A sequence enters the batch (or re-enters it after preemption)."""

    key: str
    tokens: tuple[int, ...]  # all known tokens, computed or not
    prompt_len: int  # tokens of the original prompt: what follows counts as output for penalties and min_tokens
    sampling: SamplingParams
    choice: int
    eos_token_ids: tuple[int, ...]
    scores_prompt: bool = False  # every step tells the logprobs of the prompt tokens that follow those it computes


class SequenceWork(msgspec.Struct, frozen=True, gc=False):
    """Compute `num_tokens` tokens of a sequence from position `start`; `samples`: then sample the next token."""

    key: str
    start: int
    num_tokens: int
    new_pages: tuple[int, ...]  # appended to the sequence's page table
    samples: bool
    mask: bytes | None = None  # only these tokens may be sampled: bit i % 8 of byte i // 8 is token i


@dataclass(frozen=True)
class StepPlan:
    """One step. Order: forget `ended`, add `started`, run `work`, which is never empty.

    With steps in flight `ended` may name a sequence that an earlier one still computes, and `work` one that has stopped
    in a result not read yet: what that samples is dropped by the scheduler.
    """

    step: int
    ended: tuple[str, ...]
    started: tuple[SequenceStart, ...]
    work: tuple[SequenceWork, ...]

    @property
    def num_tokens(self) -> int:
        return sum(work.num_tokens for work in self.work)


class SampledTokens(msgspec.Struct, frozen=True, gc=False):
    """0 to k tokens sampled for one sequence in one step, with their logprobs if asked for."""

    key: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


class PromptScores(msgspec.Struct, frozen=True, gc=False):
    """Logprobs of prompt tokens, the first of which stands at position `start`."""

    key: str
    start: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class StepResult:
    """What a step sampled, and scored of prompts, in the order of its plan."""

    step: int
    sampled: tuple[SampledTokens, ...]
    prompts: tuple[PromptScores, ...] = ()


def scored_positions(work: SequenceWork, prompt_len: int) -> range:
    """Positions whose hidden states score the prompt token behind them, of those that a step computes."""
    return range(work.start, min(work.start + work.num_tokens, prompt_len - 1))


class StepHandle(Protocol):
    """A submitted step."""

    def done(self) -> bool:
        """Whether `result` would not wait. Raises what the device reports."""
        ...

    def wait(self) -> None:
        """Until `done`; in any thread. Raises what the device reports."""
        ...

    def result(self) -> StepResult:
        """Wait for the step: its pages are written then. Asked for once, in the order of submission.

        Raises:
            Exception: what the step raised.
        """
        ...


class Executor(Protocol):
    """Runs steps: in this process, on N ranks, or on remote actors. Steps run in the order they were submitted."""

    @property
    def run_ahead(self) -> int:
        """Steps to submit before the result of an older one is read: 0 where `submit` itself computes, 1 on a GPU."""
        ...

    def submit(self, plan: StepPlan) -> StepHandle: ...

    def close(self) -> None: ...
