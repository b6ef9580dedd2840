"""One choice of a request: the `Sink` of the router service. Tokens in, text out to a `Listener` (see reply.py).

Called by the service in its own pass over a step's tokens: nothing here waits, and a token costs a few microseconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, NamedTuple, Protocol

from penstock.common.detokenizer import Detokenizer
from penstock.common.errors import InternalError, PenstockError, from_code
from penstock.common.logs import about
from penstock.common.messages import GenerateRequest, Spans, TokenDelta, TokenLogprobs
from penstock.common.output_text import OutputText
from penstock.common.timeline import Timeline
from penstock.common.tokenizer import Tokenizer
from penstock.router.metrics import RouterMetrics

if TYPE_CHECKING:
    from penstock.router.service import RouterService

log = logging.getLogger(__name__)


class ScoredToken(NamedTuple):
    """A kept token with its log-probabilities; `offset` is where its text begins, in characters.

    Of the first token of a prompt there are none.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    offset: int


class Listener(Protocol):
    """Who wants a choice's text."""

    def on_text(self, choice: Choice, text: str, tokens: Sequence[ScoredToken]) -> None:
        """New text (may be empty) with the scores of its tokens, if asked for; the last has `choice.ended`."""

    def on_failure(self, error: PenstockError) -> None:
        """The choice ended in an error."""


class Choice:
    """Implements `penstock.router.service.Sink`.

    `index` is the choice's place in the response, `echo` the prompt text to show before the output, `text` the state
    of the output; `ended` is set once, by a finish, a stop string, an error or `cancel`. `shown_ids` are special tokens
    that the text has in any case.
    """

    __slots__ = (
        "_listener", "_metrics", "_scores", "_service", "_spans", "_timeline", "_tokenizer", "echo", "ended",
        "first_at", "index", "last_at", "prompt_logprobs", "reasoning_tokens", "request", "text", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request: GenerateRequest,
        index: int,
        echo: str,
        tokenizer: Tokenizer,
        service: RouterService,
        metrics: RouterMetrics,
        timeline: Timeline,
        listener: Listener,
        shown_ids: Set[int] = frozenset(),
    ) -> None:
        self.request, self.index, self.echo = request, index, echo
        self._spans: dict[str, Spans] = {}  # by worker: its newest
        self.token_ids: list[int] = []  # kept output tokens
        self.prompt_logprobs: list[TokenLogprobs] | None = None  # of the prompt's tokens from the second on
        self._tokenizer = tokenizer
        self.reasoning_tokens = 0  # how many of the output's came before its reasoning had ended
        self.ended = False
        self._scores = request.sampling.logprobs is not None
        self.text = OutputText(tokenizer, request.sampling, request.prompt_token_ids, self._scores, shown_ids)
        self._service, self._metrics, self._listener = service, metrics, listener
        self._timeline = timeline
        self.first_at = self.last_at = 0.0  # of its tokens so far, monotonic; 0: none yet

    @property
    def spans(self) -> list[Spans]:
        """What the workers told of their parts, in the order in which they joined in."""
        return list(self._spans.values())

    @property
    def cached_tokens(self) -> int:
        """Of its prompt. What goes on after an attempt that was lost may find the output of another request, too."""
        found = max((span.cached_tokens for span in self._spans.values()), default=0)
        return min(found, len(self.request.prompt_token_ids))

    def on_delta(self, delta: TokenDelta) -> None:
        """New tokens. A fault of ours ends this choice, never the service's pass over the other ones."""
        if self.ended:
            return
        try:
            self._take(delta)
        except Exception:
            log.exception("a choice failed", extra=about(self.request))
            self.cancel()
            self._listener.on_failure(InternalError("internal error; the router's log has the cause"))

    def on_error(self, error: PenstockError) -> None:
        """The service gave the choice up."""
        if not self.ended:
            self.ended = True
            self._metrics.cancelled(len(self.request.prompt_token_ids), self.text.num_tokens, "error")
            self._listener.on_failure(error)

    def cancel(self) -> None:
        """No more is wanted: free what the choice holds, wherever it runs."""
        self.ended = True
        self._service.cancel(self.request.request_id, self.request.choice)

    def let_go(self) -> None:
        """It has ended, and its listener hears no more: the two keep each other from being freed."""
        assert self.ended
        del self._listener

    def _take(self, delta: TokenDelta) -> None:
        finish = delta.finish
        if delta.spans is not None:
            self._spans[delta.spans.worker] = delta.spans
        if finish is not None and finish.reason == "error":
            self.on_error(from_code(finish.code, finish.message))
            return
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.token_ids:
            now = time.monotonic()
            if self.last_at:
                self._metrics.inter_token_latency.observe(now - self.last_at)
            else:
                self._begin(now)
            self.last_at = now
        text = self.text.push(delta.token_ids, finish)
        over = self.text.finish_reason is not None
        self.token_ids += delta.token_ids[: self.text.kept] if over else delta.token_ids
        tokens = self._scored(delta) if self._scores else ()
        if over:
            self._end(cancel=finish is None)
        self._listener.on_text(self, text, tokens)

    def _begin(self, now: float) -> None:
        self.first_at = now
        self._timeline.mark("first_token", now)
        self._metrics.time_to_first_token.observe(now - self._timeline.marks["received"])

    def _scored(self, delta: TokenDelta) -> Sequence[ScoredToken]:
        if delta.logprobs is None:
            return ()
        kept = self.text.kept
        offsets = self.text.offsets
        if self.echo:
            offsets = [len(self.echo) + offset for offset in offsets]
        return list(map(ScoredToken, delta.token_ids[:kept], delta.logprobs[:kept], offsets))

    def scored_prompt(self) -> list[ScoredToken]:
        """The prompt's tokens, to be echoed with their scores; none unless logprobs were asked for."""
        if not self._scores:
            return []
        offsets, end = [], 0
        detokenizer = Detokenizer(self._tokenizer)  # a token's text alone tells nothing of split characters and spaces
        for token_id in self.request.prompt_token_ids:
            offsets.append(min(end, len(self.echo)))
            end += len(detokenizer.push([token_id]))
            if token_id in self._tokenizer.special_ids:  # the echo has those that the client wrote, and not bos
                text = self._tokenizer.token_text(token_id)
                end += len(text) if self.echo.startswith(text, end) else 0
        scores = [None] * len(offsets) if self.prompt_logprobs is None else [None, *self.prompt_logprobs]
        return list(map(ScoredToken, self.request.prompt_token_ids, scores, offsets))

    def _end(self, cancel: bool) -> None:
        if cancel:
            self.cancel()
        self.ended = True
        now = time.monotonic()
        latency_s = now - self._timeline.marks["received"]
        reason, decoding_s = self.text.finish_reason or "", self.last_at - self.first_at
        prompt_tokens, output_tokens = len(self.request.prompt_token_ids), self.text.num_tokens
        self._metrics.finished(reason, prompt_tokens, output_tokens, latency_s, decoding_s, self.spans)
