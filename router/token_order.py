"""The order of one choice's tokens: each exactly once, without gaps, whoever sends them. Pure; kept by dispatch.py.

The prefill worker sends the first token, the decode worker the rest, on links of their own; a message may be repeated,
and a later attempt goes on behind what the client has. `TokenDelta.index` tells where a delta belongs.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from penstock.common.messages import TokenDelta

MAX_EARLY = 1024  # deltas that came before their turn


class Diverged(Exception):
    """A worker says something else than what was delivered."""


class TokenOrder:
    """Of one choice, over all its attempts."""

    __slots__ = ("delivered", "early", "steady")

    def __init__(self, delivered: list[int]) -> None:
        """`delivered`: what the client has; the caller adds to it what it delivers."""
        self.delivered = delivered
        self.early: list[TokenDelta] = []  # of this attempt, before their turn
        self.steady = False  # this attempt has delivered, and nothing is early: the next delta is most likely just that

    def put(self, delta: TokenDelta) -> None:
        """A delta of the present attempt has come."""
        self.early.append(delta)
        self.early.sort(key=lambda early: early.index)

    def due(self) -> Iterator[TokenDelta]:
        """What comes next, less what the client has, as long as the caller delivers each before it asks for another.

        Raises:
            Diverged: the attempt is useless.
        """
        while self.early and self.early[0].index <= len(self.delivered):
            delta = self.early.pop(0)
            overlap = len(self.delivered) - delta.index
            known = self.delivered[delta.index : delta.index + len(delta.token_ids)]
            # One that moves may do so before it says the first token, which the prefill worker has said.
            ends = delta.finish is not None and delta.finish.reason != "moved"
            ended_before = ends and overlap > len(delta.token_ids)
            if known != delta.token_ids[:overlap] or ended_before:
                raise Diverged
            yield _without(delta, overlap)
        self.steady = not self.early

    def begin_attempt(self) -> None:
        """What comes from now on is another attempt's."""
        self.early.clear()
        self.steady = False


def _without(delta: TokenDelta, known: int) -> TokenDelta:
    """The delta less its first `known` tokens."""
    if known == 0:
        return delta
    known = min(known, len(delta.token_ids))
    logprobs = delta.logprobs[known:] if delta.logprobs is not None else None
    return msgspec.structs.replace(
        delta, index=delta.index + known, token_ids=delta.token_ids[known:], logprobs=logprobs
    )
