"""Compares what the prefix index predicted of each request with what its worker found. Pure; fed by the service.

Both are counted in prompt tokens, at the worker that computes the prompt. A little difference is normal: a prefix may
be evicted, or computed for somebody else, between the look-up and the worker's turn. A large one means that the index
is wrong, or that router and worker hash prompts differently: then requests go to workers that do not hold them.
"""

from __future__ import annotations

from collections.abc import Container
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


@dataclass
class _Window:
    """Requests that are judged together: how many, and their tokens."""

    requests: int = 0
    prompt: int = 0
    predicted: int = 0
    realised: int = 0
    apart: int = 0  # summed request by request


class HitCheck:
    """Totals of one router, and the predictions of requests whose worker has not reported yet."""

    def __init__(self) -> None:
        self._open: dict[Key, _Prediction] = {}
        self._first: dict[tuple[str, str], Key] = {}  # by request and worker: its first choice there
        self._predicted = 0
        self._realised = 0
        self._missed = 0  # predicted and not found, request by request
        self._window = _Window()
        self._warned_at = float("-inf")

    def counters(self) -> dict[str, int]:
        """Prompt tokens since the start: predicted, realised, and predicted without being found."""
        return {
            "predicted_hit_tokens": self._predicted,
            "realised_hit_tokens": self._realised,
            "missed_hit_tokens": self._missed,
        }

    def predicted(self, key: Key, attempt: int, worker_id: str, held_pages: int, page_size: int, tokens: int) -> None:
        """This worker will compute a prompt of `tokens` tokens, of which it holds `held_pages` whole pages. Another
        choice of the same request finds what its first one there computes: of that nothing is predicted."""
        if self._first.setdefault((key[0], worker_id), key) != key:
            return
        most = (tokens - 1) // page_size  # the last token is always computed, for its logits
        self._open[key] = _Prediction(attempt, worker_id, min(held_pages, most) * page_size, tokens)

    def keep(self, keys: Container[Key]) -> None:
        """No other request is under way any more: some end without a report, aborted, or with their worker."""
        for key in [key for key in self._open if key not in keys]:
            del self._open[key]
        for place in [place for place, key in self._first.items() if key not in keys]:
            del self._first[place]

    def reported(self, key: Key, attempt: int, spans: Spans, now: float) -> str:
        """A worker's figures of a request; another worker's or attempt's do not count. Returns a warning, or ""."""
        prediction = self._open.get(key)
        if prediction is None or (prediction.attempt, prediction.worker_id) != (attempt, spans.worker):
            return ""
        del self._open[key]
        self._predicted += prediction.tokens
        self._realised += spans.cached_tokens
        self._missed += max(0, prediction.tokens - spans.cached_tokens)
        window = self._window
        window.requests += 1
        window.prompt += prediction.prompt_tokens
        window.predicted += prediction.tokens
        window.realised += spans.cached_tokens
        window.apart += abs(prediction.tokens - spans.cached_tokens)
        if window.requests < WINDOW:
            return ""
        self._window = _Window()
        if window.apart <= TOLERATED * window.prompt or now - self._warned_at < WARN_EVERY_S:
            return ""
        self._warned_at = now
        return (
            f"predicted and realised prefix hits part: of the last {window.prompt} prompt tokens {window.predicted} "
            f"were predicted to be cached and {window.realised} were; request by request {window.apart} tokens differ"
        )
