"""Reading text that comes in pieces: what the parsers of tool calls and of reasoning are written with. Pure.

A parser is a generator over a `Text`: straight-line code that yields events, and None where it needs more text. An
answer in one piece goes through the same generator, fed once, so that streams and whole answers cannot differ.
`Incremental` drives one. Users: router/tools, router/reasoning, answer_parser.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of the tool `name`; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of the running call's arguments."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """The running call is over; its arguments may still be cut short, or no JSON."""


Event = Content | Reasoning | CallBegins | Arguments | CallEnds
_T = TypeVar("_T")
Steps = Generator[Event | None, None, _T]  # yields events, None for "more text, please"; returns a result
Emit = Callable[[str], Event]

_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[^\s{}\[\]()<>\"'=,;:]*")
_SCALAR = re.compile(r"[-+.\w]*")
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_STRUCTURE = {
    stops: re.compile(f"[{{}}\\[\\](){quotes}{re.escape(stops)}]") for stops, quotes in (("", '"'), (",)", "\"'"))
}
_IN_STRING = {quote: re.compile(rf"[{quote}\\]") for quote in "\"'"}
MAX_PYTHON_DEPTH = 50  # Python's own parser gives up at 200


class Text:
    """What the model has said and no parser has taken yet.

    Where several literals or markers are searched for at once, none may be the beginning of another one.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._marks: list[int] = []  # where running attempts began
        self.ended = False

    def add(self, text: str) -> None:
        """More text from the model."""
        start = self._marks[0] if self._marks else self._at
        self._text = self._text[start:] + text
        self._at -= start
        self._marks = [mark - start for mark in self._marks]

    def rest(self) -> str:
        """Take all that there is now."""
        at, self._at = self._at, len(self._text)
        return self._text[at:]

    def attempt(self, steps: Steps[bool]) -> Steps[bool]:
        """Do `steps`; if they return False, nothing has been read. False is allowed until the first event only."""
        depth = len(self._marks)
        self._marks.append(self._at)
        done = yield from self._committing(steps)
        if len(self._marks) > depth:
            mark = self._marks.pop()
            if not done:
                self._at = mark
        return done

    def _committing(self, steps: Steps[bool]) -> Steps[bool]:
        while True:
            try:
                event = next(steps)
            except StopIteration as stop:
                return bool(stop.value)
            if event is not None:
                self._marks.clear()  # there is no way back, so nothing needs to be kept
            yield event

    def unread(self, text: str) -> None:
        """Put back what was taken last."""
        self._at -= len(text)

    def peek(self) -> Steps[str]:
        """The next character, "" at the end; it is not taken."""
        while self._at == len(self._text) and not self.ended:
            yield None
        return self._text[self._at : self._at + 1]

    def spaces(self) -> Steps[None]:
        """Take white space."""
        yield from self._run(_SPACE)

    def word(self) -> Steps[str]:
        """Take what a name can consist of: no white space, quotes, brackets or separators."""
        word = yield from self._run(_WORD)
        return word

    def accept(self, *literals: str) -> Steps[str]:
        """Take the one of `literals` that comes next; "" if none does."""
        longest = max(map(len, literals))
        while True:
            ahead = self._text[self._at : self._at + longest]
            for literal in literals:
                if ahead.startswith(literal):
                    self._at += len(literal)
                    return literal
            if self.ended or not any(literal.startswith(ahead) for literal in literals):
                return ""
            yield None

    def until(self, markers: tuple[str, ...], emit: Emit = Content) -> Steps[str]:
        """Emit the text before the first marker, take and return the marker; "" if the text ends without one.

        What may be the beginning of a marker is held back.
        """
        pattern = _any_of(markers)
        while True:
            match = pattern.search(self._text, self._at)
            end = match.start() if match else len(self._text) - (0 if self.ended else self._begun(markers))
            piece, self._at = self._text[self._at : end], end
            if piece:
                yield emit(piece)
            if match:
                self._at = match.end()
                return match[0]
            if self.ended:
                return ""
            yield None

    def json(self, emit: Emit = Content) -> Steps[bool]:
        """Take one JSON value, as it comes. False if there is none, it is cut short, or its brackets do not match."""
        first = yield from self.peek()
        if first in _CLOSERS or first == '"':
            return (yield from self._balanced(emit, ""))
        scalar = yield from self._run(_SCALAR)
        if scalar:
            yield emit(scalar)
        return bool(scalar)

    def python(self, emit: Emit = Content) -> Steps[bool]:
        """Take one Python expression up to a comma or bracket that ends it. False if it is cut short."""
        return (yield from self._balanced(emit, ",)"))

    def _balanced(self, emit: Emit, stops: str) -> Steps[bool]:
        """Up to one of `stops` outside all brackets, or, without any, to the end of the first value."""
        stack: list[str] = []  # what closes the open brackets, and a quote inside a string
        while True:
            at, outcome = self._scan(stack, stops)
            piece, self._at = self._text[self._at : at], at
            if piece:
                yield emit(piece)
            if outcome is not None:
                return outcome
            if self.ended:
                piece = self.rest()  # a backslash at the end
                if piece:
                    yield emit(piece)
                return False
            yield None

    def _scan(self, stack: list[str], stops: str) -> tuple[int, bool | None]:
        """(end of what belongs to the value, True if it is complete and False if it is broken)."""
        text, at = self._text, self._at
        while True:
            quoted = bool(stack) and stack[-1] in _IN_STRING
            match = (_IN_STRING[stack[-1]] if quoted else _STRUCTURE[stops]).search(text, at)
            if match is None:
                return len(text), None
            char = match[0]
            if char == "\\":
                if match.end() == len(text):
                    return match.start(), None
                at = match.end() + 1
                continue
            if not stack and char in stops:
                return match.start(), True
            if quoted or (stack and char == stack[-1]):
                stack.pop()
            elif char in _CLOSERS:
                stack.append(_CLOSERS[char])
            elif char in _IN_STRING:
                stack.append(char)
            elif char not in stops or char == ")":
                return match.start(), False
            if stops and len(stack) > MAX_PYTHON_DEPTH:
                return match.start(), False
            at = match.end()
            if not stack and not stops:
                return at, True

    def _run(self, pattern: re.Pattern[str]) -> Steps[str]:
        start = self._at
        pieces = []
        while True:
            match = pattern.match(self._text, self._at)
            assert match is not None, "these patterns match nothing, too"
            start, self._at = self._at, match.end()
            pieces.append(self._text[start : self._at])
            if self._at < len(self._text) or self.ended:
                return "".join(pieces)
            yield None

    def _begun(self, markers: tuple[str, ...]) -> int:
        """Length of the longest end of the text that begins a marker."""
        text = self._text
        firsts, longest = _firsts(markers)
        match = firsts.search(text, max(self._at, len(text) - longest + 1))
        while match is not None:  # rarely: a token of plain text costs one search
            end = text[match.start() :]
            if any(marker.startswith(end) for marker in markers):
                return len(end)
            match = firsts.search(text, match.end())
        return 0


def capture(steps: Steps[_T]) -> Steps[tuple[str, _T]]:
    """(the text that `steps` would emit as content, their result): nothing is emitted."""
    pieces: list[str] = []
    while True:
        try:
            event = next(steps)
        except StopIteration as stop:
            return "".join(pieces), stop.value
        if event is None:
            yield None
        else:
            assert isinstance(event, Content), "only content can be captured"
            pieces.append(event.text)


class Incremental:
    """One running parser: text in, events out. What a parser that returned has left is content."""

    def __init__(self, parse: Callable[[Text], Steps[None]]) -> None:
        self._text = Text()
        self._steps: Steps[None] | None = parse(self._text)

    def push(self, text: str) -> list[Event]:
        """The events that `text` completes."""
        self._text.add(text)
        return self._drain()

    def finish(self) -> list[Event]:
        """What was held back."""
        self._text.ended = True
        return self._drain()

    def _drain(self) -> list[Event]:
        events: list[Event] = []
        while self._steps is not None:
            try:
                event = next(self._steps)
            except StopIteration:
                self._steps = None
                break
            if event is not None:
                events.append(event)
            elif self._text.ended:
                raise RuntimeError("a parser waits for text after its end")
            else:
                return events
        rest = self._text.rest()
        return [*events, Content(rest)] if rest else events


@lru_cache(maxsize=256)
def _firsts(markers: tuple[str, ...]) -> tuple[re.Pattern[str], int]:
    """(what finds the first character of any marker, the longest marker's length)."""
    return re.compile("|".join(sorted({re.escape(marker[0]) for marker in markers}))), max(map(len, markers))


@lru_cache(maxsize=256)
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))
