"""Compares what the prefix index predicted of each request with what its worker found. Pure; fed by the service.

Both are counted in prompt tokens, at the worker that computes the prompt. A little difference is normal: a prefix may
be evicted, or computed for somebody else, between the look-up and the worker's turn. A large one means that the index
is wrong, or that router and worker hash prompts differently: then requests go to workers that do not hold them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from penstock.common.messages import Spans

WINDOW = 100  # requests that are judged together
TOLERATED = 0.1  # of their prompt tokens
WARN_EVERY_S = 60.0

Key = tuple[str, int]  # request id and choice


@dataclass(frozen=True)
class _Prediction:
    attempt: int
    worker_id: str
    tokens: int
    prompt_tokens: int


class HitCheck:
    """Totals of one router, and the predictions of requests whose worker has not reported yet: `max_open` at most."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._open: OrderedDict[Key, _Prediction] = OrderedDict()
        self._predicted = 0
        self._realised = 0
        self._missed = 0  # predicted and not found, request by request
        self._window: list[tuple[int, int, int]] = []  # predicted, realised and prompt tokens
        self._warned_at = float("-inf")

    def counters(self) -> dict[str, int]:
        """Prompt tokens since the start: predicted, realised, and predicted without being found."""
        return {
            "predicted_hit_tokens": self._predicted,
            "realised_hit_tokens": self._realised,
            "missed_hit_tokens": self._missed,
        }

    def predicted(self, key: Key, attempt: int, worker_id: str, held_pages: int, page_size: int, tokens: int) -> None:
        """This worker will compute a prompt of `tokens` tokens, of which it holds `held_pages` whole pages."""
        self._open.pop(key, None)
        most = (tokens - 1) // page_size  # the last token is always computed, for its logits
        self._open[key] = _Prediction(attempt, worker_id, min(held_pages, most) * page_size, tokens)
        if len(self._open) > self._max_open:  # those that ended without a report: aborted, or lost with their worker
            self._open.popitem(last=False)

    def reported(self, key: Key, attempt: int, spans: Spans, now: float) -> str:
        """A worker's figures of a request; another worker's or attempt's do not count. Returns a warning, or ""."""
        prediction = self._open.get(key)
        if prediction is None or (prediction.attempt, prediction.worker_id) != (attempt, spans.worker):
            return ""
        del self._open[key]
        self._predicted += prediction.tokens
        self._realised += spans.cached_tokens
        self._missed += max(0, prediction.tokens - spans.cached_tokens)
        self._window.append((prediction.tokens, spans.cached_tokens, prediction.prompt_tokens))
        if len(self._window) < WINDOW:
            return ""
        window, self._window = self._window, []
        apart = sum(abs(predicted - realised) for predicted, realised, _ in window)
        tokens = sum(prompt for _, _, prompt in window)
        if apart <= TOLERATED * tokens or now - self._warned_at < WARN_EVERY_S:
            return ""
        self._warned_at = now
        predicted, realised = (sum(one[i] for one in window) for i in (0, 1))
        return (
            f"predicted and realised prefix hits part: of the last {tokens} prompt tokens {predicted} were predicted "
            f"to be cached and {realised} were; request by request {apart} tokens differ"
        )
