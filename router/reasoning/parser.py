"""What a reasoning parser is; a plugin's, too (docs/tools.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from penstock.router.incremental import Reasoning, Steps, Text

Format = dict[str, Any]


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

    def before(self, form: Format) -> Format | None:
        """The format (of structural tags) of an answer that may reason and then has `form`.

        `form` itself if it cannot reason; None if there is no telling: then it must not.
        """
        return None


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
        if not started and "" not in self._begins():
            return
        end = yield from text.until((*self.ends, *self.implied_ends), Reasoning)
        if end in self.implied_ends:
            text.unread(end)

    def _start(self, text: Text) -> Steps[bool]:
        yield from text.spaces()
        return bool((yield from text.accept(*self.starts)))

    def before(self, form: Format) -> Format:
        """See `ReasoningParser`."""
        begins = self._begins()
        if not begins:
            return form
        tags = [{"type": "tag", "begin": at, "content": {"type": "any_text"}, "end": list(self.ends)} for at in begins]
        reasoned = {"type": "sequence", "elements": [tags[0] if len(tags) == 1 else _either(*tags), form]}
        return reasoned if "" in begins else _either(reasoned, form)

    def _begins(self) -> tuple[str, ...]:
        """How an answer's reasoning may begin: "" where it has begun already. Nothing: it is over."""
        prompt = self.beginning.prompt
        if self.beginning.continues:
            begun = max(map(prompt.rfind, self.starts)) > max(map(prompt.rfind, self.ends))
            return ("",) if begun else ()
        prompt = prompt.rstrip()
        if prompt.endswith(self.starts):
            return ("",)
        if prompt.endswith(self.ends) or self.beginning.thinking is False:
            return ()
        return ("", *self.starts) if self.inside else self.starts


def _either(*formats: Format) -> Format:
    return {"type": "or", "elements": list(formats)}
