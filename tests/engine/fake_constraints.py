"""Constraints without a grammar: which tokens may come next is a function of the output, known after a few looks."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from penstock.common.messages import Finish, GenerateRequest
from penstock.common.structured_outputs import StructuredOutputsParams

FORM = StructuredOutputsParams(regex="fake")


def fake_mask(output: Sequence[int], vocab: int) -> bytes:
    """Two of three tokens, by what the output is so far."""
    turn = sum(output) + len(output)
    value = sum(1 << token for token in range(vocab) if (token + turn) % 3)
    return value.to_bytes(4 * -(-vocab // 32), "little")


class FakeConstraint:
    """The form of one output."""

    finish: Finish | None = None
    slow = False

    def __init__(self, source: GenerateRequest, vocab: int, pick: random.Random) -> None:
        self._output, self._vocab, self._pick = list(source.output_token_ids), vocab, pick

    @property
    def ready(self) -> bool:
        return self._pick.random() < 0.6

    @property
    def mask(self) -> bytes:
        return fake_mask(self._output, self._vocab)

    def allows(self, token: int) -> bool:
        return bool(self.mask[token // 8] >> token % 8 & 1)

    def accept(self, tokens: Sequence[int]) -> None:
        self._output += tokens


class FakeConstraints:
    """Stands for `Constraints`."""

    def __init__(self, vocab: int, pick: random.Random) -> None:
        self._vocab, self._pick = vocab, pick

    def begin(self, source: GenerateRequest) -> FakeConstraint | None:
        return FakeConstraint(source, self._vocab, self._pick) if source.sampling.structured_outputs else None

    def accept(self, news: Sequence[tuple[FakeConstraint, Sequence[int]]]) -> None:
        for constraint, tokens in news:
            constraint.accept(tokens)

    def wait(self, constraints: Iterable[FakeConstraint]) -> None:
        """Nothing is being computed."""

    def close(self) -> None:
        """Nothing is open."""
