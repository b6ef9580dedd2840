"""Outputs that must take a form: what each may go on with, computed beside the engine's steps.

A request with `structured_outputs` has a `Constraint`. It is told the tokens that the output got, and finds out in a
thread which ones may follow: a mask, a bit a token. Until the mask is there the scheduler does not plan a step that
samples for the request, so a form that takes long holds up nobody else. A constraint is never sent anywhere: wherever a
request goes, the one there reads the output so far.

Masks of a few milliseconds are waited for (`Constraints.wait`), as they are computed while the loop sends the last
tokens; slow ones are not, and have threads of their own, which also compile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from llguidance import LLMatcher

from penstock.common.cores import available_cores
from penstock.common.grammar import MAX_MASK_S, GrammarError, Grammars
from penstock.common.messages import Finish, GenerateRequest

logger = logging.getLogger(__name__)
WAIT_S = 0.005  # how long a step may wait for masks
SLOW_THREADS = 2
STOP = Finish(reason="stop")


class Constraint:
    """The form of one output. Its methods are the engine's thread's; what they start runs in others."""

    def __init__(self, owner: Constraints, source: GenerateRequest) -> None:
        assert source.sampling.structured_outputs is not None
        self._owner = owner
        self._params = source.sampling.structured_outputs
        self._ends = () if source.sampling.ignore_eos else tuple(source.eos_token_ids)
        self._matcher: LLMatcher | None = None
        self._mask = b""
        self._finish: Finish | None = None
        self.slow = True  # the form has to be compiled first
        self.job: Future[None]  # what is being computed, or was last
        owner.accept([(self, source.output_token_ids)])

    @property
    def ready(self) -> bool:
        """Whether `mask` and `finish` are those of the whole output so far."""
        return self.job.done()

    @property
    def mask(self) -> bytes:
        """Bit i % 8 of byte i // 8: token i may come next. Empty once the output has ended."""
        return self._mask

    @property
    def finish(self) -> Finish | None:
        """Why the output has ended: nothing may follow, or the form cannot be followed."""
        return self._finish

    def allows(self, token: int) -> bool:
        """Whether `mask` has the token."""
        return token // 8 < len(self._mask) and bool(self._mask[token // 8] >> token % 8 & 1)

    def advance(self, tokens: Sequence[int]) -> None:
        """Read tokens and compute the mask behind them: the thread's part."""
        began = time.thread_time()
        try:
            self._advance(tokens)
        except Exception as error:  # shown to the client, like any other reason
            if not isinstance(error, GrammarError):
                logger.exception("a constrained output")
            self._end(str(error))
        self.slow = time.thread_time() - began > WAIT_S
        if time.thread_time() - began > MAX_MASK_S and self._finish is None:
            self._end(f"{self._params.kind}: too complex, finding the next tokens takes too long")

    def _advance(self, tokens: Sequence[int]) -> None:
        if self._matcher is None:
            self._matcher = self._owner.grammars.compile(self._params).result().deep_copy()
        matcher = self._matcher
        if tokens and not matcher.consume_tokens(list(tokens)):
            raise GrammarError(f"{self._params.kind}: {_first_line(matcher)}")
        if matcher.is_stopped():
            self._mask, self._finish = b"", STOP
            return
        mask = bytearray(matcher.compute_bitmask())
        if matcher.is_error():  # the mask would be that of the end
            raise GrammarError(f"{self._params.kind}: {_first_line(matcher)}")
        may_end = matcher.is_accepting()
        for token in self._owner.grammars.end_token_ids:
            mask[token // 8] &= ~(1 << token % 8)
        if not mask.strip(b"\0"):
            if not may_end:
                raise GrammarError(f"{self._params.kind}: nothing can follow")
            self._mask, self._finish = b"", STOP
            return
        for token in self._ends if may_end else ():
            if token // 8 < len(mask):
                mask[token // 8] |= 1 << token % 8
        self._mask = bytes(mask)

    def _end(self, message: str) -> None:
        self._mask = b""
        self._finish = Finish(reason="error", code="invalid_request", message=f"structured_outputs.{message}")


News = tuple[Constraint, Sequence[int]]


class Constraints:
    """Makes constraints, and has the threads that compute for them."""

    def __init__(self, grammars: Grammars) -> None:
        self.grammars = grammars
        self._num_quick = max(1, min(4, available_cores() // 2))
        self._quick = ThreadPoolExecutor(self._num_quick, thread_name_prefix="masks")
        self._slow = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="slow-masks")

    def begin(self, source: GenerateRequest) -> Constraint | None:
        """The constraint of a request, if its output has a form."""
        return None if source.sampling.structured_outputs is None else Constraint(self, source)

    def accept(self, news: Sequence[News]) -> None:
        """Outputs got these tokens: their constraints are ready again when a thread has advanced them.

        A job a thread, not one an output: handing over a job costs as much as a mask.
        """
        quick = [item for item in news if not item[0].slow]
        for item in [item for item in news if item[0].slow]:
            item[0].job = self._slow.submit(_advance, [item])
        share = max(1, -(-len(quick) // self._num_quick))
        for at in range(0, len(quick), share):
            part = quick[at : at + share]
            job = self._quick.submit(_advance, part)
            for constraint, _ in part:
                constraint.job = job

    def wait(self, constraints: Iterable[Constraint]) -> None:
        """Wait for the masks, but not for long."""
        jobs = {constraint.job for constraint in constraints if not constraint.ready}
        if jobs:
            wait_for(jobs, timeout=WAIT_S)

    def close(self) -> None:
        """Nothing more is computed; what is under way is not waited for."""
        self.grammars.close()
        for threads in (self._quick, self._slow):
            threads.shutdown(wait=False, cancel_futures=True)


def _advance(news: Sequence[News]) -> None:
    for constraint, tokens in news:
        constraint.advance(tokens)


def _first_line(matcher: LLMatcher) -> str:
    return str(matcher.get_error().partition("\n")[0])
