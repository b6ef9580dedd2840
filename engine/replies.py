"""Collects a step's token deltas per router, so that each router gets few messages a step: one, unless it is large."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import msgspec

from penstock.common.logs import about, requests
from penstock.common.messages import Finish, GenerateRequest, Message, Spans, TokenBatch, TokenDelta
from penstock.engine.outputs import HANDED_OFF, Output

MAX_DELTAS = 1000  # of a message: a router reads one in a few milliseconds, and is kept from everything else meanwhile
MAX_SCORES_BYTES = 8 << 20  # of a message, unless one delta has more: whoever gets more than the bus carries hangs up
_PAIR_BYTES = 14  # a token and its logprob, at most


class Replies:
    """Deltas waiting to be sent, by the router's bus identity."""

    def __init__(self, send: Callable[[bytes, Message], None]) -> None:
        self._send = send
        self._waiting: dict[bytes, list[TokenDelta]] = {}

    def add(self, router: bytes, delta: TokenDelta) -> None:
        self._waiting.setdefault(router, []).append(delta)

    def end(self, router: bytes, request: GenerateRequest, finish: Finish, *, index: int | None = None) -> None:
        """A request ends here without new tokens."""
        index = len(request.output_token_ids) if index is None else index
        self.add(router, TokenDelta(request.request_id, request.attempt, request.choice, index, [], finish))

    def flush(self) -> None:
        """Send everything that waits."""
        if self._waiting:
            waiting, self._waiting = self._waiting, {}
            for router, deltas in waiting.items():
                for part in _parts(deltas):
                    self._send(router, TokenBatch(deltas=part))


def _parts(deltas: list[TokenDelta]) -> Iterator[list[TokenDelta]]:
    """All of them in order, in as few parts as the limits allow."""
    part: list[TokenDelta] = []
    part_bytes = 0
    for delta in deltas:
        size_bytes = _scores_bytes(delta) if delta.logprobs or delta.prompt_logprobs else 0
        if part and (len(part) == MAX_DELTAS or part_bytes + size_bytes > MAX_SCORES_BYTES):
            yield part
            part, part_bytes = [], 0
        part.append(delta)
        part_bytes += size_bytes
    yield part


def _scores_bytes(delta: TokenDelta) -> int:
    """What its logprobs take at most."""
    scores = (*(delta.logprobs or ()), *(delta.prompt_logprobs or ()))
    return _PAIR_BYTES * sum([2 + len(at.top_ids) for at in scores])


def prompt_scores_bytes(request: GenerateRequest, vocab_size: int) -> int:
    """What the logprobs of its prompt take at most, in the one delta that brings them."""
    top = min(request.sampling.prompt_logprobs or 0, vocab_size)
    return _PAIR_BYTES * (2 + top) * len(request.prompt_token_ids)


def to_delta(output: Output, spans: Spans | None = None) -> TokenDelta:
    """An engine output as it travels; a hand-off is not an end to the router."""
    request = output.request
    return TokenDelta(
        request.request_id,
        request.attempt,
        request.choice,
        output.index,
        list(output.token_ids),
        None if output.finish is HANDED_OFF else output.finish,
        None if output.logprobs is None else list(output.logprobs),
        spans or output.spans,
        None if output.prompt_logprobs is None else list(output.prompt_logprobs),
    )


def log_end(output: Output, spans: Spans | None) -> None:
    """Tell the log how a request ended here, if it is to know of every request."""
    if output.finish is None or not requests.isEnabledFor(logging.INFO):
        return
    known = msgspec.to_builtins(spans) if spans is not None else {}  # without those that are zero
    facts = {name: round(value, 3) if isinstance(value, float) else value for name, value in known.items()}
    facts |= {"reason": output.finish.reason, "output_tokens": output.index + len(output.token_ids)}
    shown = " ".join(f"{name}={value}" for name, value in facts.items())
    requests.info("ended here: %s", shown, extra=about(output.request, **facts))
