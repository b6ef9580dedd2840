"""The seam between what happened to a request (`Delta`, `Usage`, an error) and how a route writes it (`AnswerFormat`).

reply.py tells, a format writes: choices_format.py has what completions and chat share. What a choice said is in `Said`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import msgspec

from penstock.common.errors import PenstockError
from penstock.router.choice import Choice, ScoredToken


class CallDelta(NamedTuple):
    """A piece of a tool call; the first of each call has its id and name, whatever the number of pieces."""

    call: int  # counts the calls of a choice
    arguments: str = ""  # JSON, to be joined
    call_id: str | None = None
    name: str | None = None


class Delta(msgspec.Struct, frozen=True):  # as quick to make as a tuple of C's: there is one for every token
    """What a choice said since the last one: reasoning comes before content, calls after it."""

    content: str = ""
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    tokens: Sequence[ScoredToken] = ()  # scored ones, if asked for
    finish_reason: str | None = None  # in the last one


class Usage(NamedTuple):
    """Tokens of a request: every prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt's
    reasoning_tokens: int = 0  # of the completion's


@dataclass
class Call:
    """A tool call as far as it is known."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass
class Said:
    """The deltas of one choice, joined."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Take the next delta."""
        self.content += delta.content
        self.reasoning += delta.reasoning
        for piece in delta.calls:
            if piece.call == len(self.calls):
                self.calls.append(Call(piece.call_id or "", piece.name or ""))
            self.calls[piece.call].arguments += piece.arguments
        self.tokens.extend(delta.tokens)
        self.finish_reason = delta.finish_reason


class AnswerFormat(ABC):
    """One request's way of writing its answer, in one piece (`whole`) or as events (the other methods).

    With `opens_together` all choices are opened, in order, with the first one that says something.
    """

    opens_together: ClassVar[bool] = False

    @abstractmethod
    def whole(
        self, choices: Sequence[Choice], said: Sequence[Said], usage: Usage, timeline: list[dict[str, Any]] | None
    ) -> bytes:
        """The body of an answer in one piece; `timeline` is for clients that asked for it."""

    @abstractmethod
    def opening(self, choice: Choice) -> bytes:
        """The events that a streamed choice begins with; may be none."""

    @abstractmethod
    def delta(self, choice: Choice, delta: Delta, usage: Usage | None) -> bytes:
        """The events for what a choice said, `usage` so far if every event is to have it."""

    def text(self, choice: Choice, text: str) -> bytes:
        """The events for content and nothing else: nearly all of them."""
        return self.delta(choice, Delta(text), None)

    @abstractmethod
    def closing(self, usage: Usage, timeline: list[dict[str, Any]] | None) -> bytes:
        """The events that end a stream, after the last delta of the last choice."""

    @abstractmethod
    def failure(self, error: PenstockError) -> bytes:
        """The events that end a stream that fails after its first event."""
