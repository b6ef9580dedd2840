"""What a reasoning parser is; a plugin's, too (docs/tools.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from penstock.router.incremental import Reasoning, Steps, Text


@dataclass(frozen=True)
class Beginning:
    """What the answer begins with already: the end of the prompt.

    `prompt` is the prompt's text, or, if the answer continues a message (`continues`), that message's content.
    `thinking` is what the client asked of the template: True, False, or None for nothing.
    """

    prompt: str = ""
    continues: bool = False
    thinking: bool | None = None


class ReasoningParser(ABC):
    """Takes the reasoning off the beginning of an answer. `names` and `markers` are as in `ToolParser`."""

    names: ClassVar[tuple[str, ...]]
    markers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, beginning: Beginning) -> None:
        self.beginning = beginning

    @abstractmethod
    def parse(self, text: Text) -> Steps[None]:
        """Emit the reasoning and return where it ends; the rest is for the tool parser, or content."""


class Marked(ReasoningParser):
    """Reasoning between a start marker, at the very beginning, and an end marker.

    Templates often write the start marker, or both for no reasoning at all: then the model does not. With `inside`, an
    answer of which nothing is known begins inside. `implied_ends` end the reasoning, too, but belong to what follows.
    """

    starts: ClassVar[tuple[str, ...]]
    ends: ClassVar[tuple[str, ...]]
    implied_ends: ClassVar[tuple[str, ...]] = ()
    inside: ClassVar[bool] = False

    def parse(self, text: Text) -> Steps[None]:
        """See `ReasoningParser`."""
        started = yield from text.attempt(self._start(text))
        if not started and not self._begins_inside():
            return
        end = yield from text.until((*self.ends, *self.implied_ends), Reasoning)
        if end in self.implied_ends:
            text.unread(end)

    def _start(self, text: Text) -> Steps[bool]:
        yield from text.spaces()
        return bool((yield from text.accept(*self.starts)))

    def _begins_inside(self) -> bool:
        prompt = self.beginning.prompt
        if self.beginning.continues:
            return max(map(prompt.rfind, self.starts)) > max(map(prompt.rfind, self.ends))
        prompt = prompt.rstrip()
        if prompt.endswith(self.starts):
            return True
        if prompt.endswith(self.ends):
            return False
        return self.inside and self.beginning.thinking is not False
