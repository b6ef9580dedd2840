"""Finds stop strings in text that comes in pieces. Pure; used through `OutputText`.

Text that may be the beginning of a stop string is held back, at most the longest stop string less one character.
The match that ends first wins (of two that end together, the longer), so the cut of the pieces cannot matter.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Scans the text of one choice; after a match everything is swallowed."""

    __slots__ = ("_firsts", "_held", "_include", "_longest", "_stops", "_unsearched", "matched")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._held = ""
        self._unsearched = 0  # characters of `_held` in which no match may end
        self.matched: str | None = None

    def push(self, text: str, searched: bool = True) -> tuple[str, str | None]:
        """(text to show now, the stop string that was found, or None). No match ends in text that is not searched,
        but one may begin there."""
        if self.matched is not None:
            return "", self.matched
        if not self._stops:
            return text, None
        text = self._held + text
        unsearched = self._unsearched if searched else len(text)
        match = self._first_match(text, unsearched) if searched else None
        if match is not None:
            start, stop = match
            self._held, self.matched = "", stop
            return text[: start + len(stop) if self._include else start], stop
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        self._unsearched = max(0, unsearched - (len(text) - keep))
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, unsearched: int) -> tuple[int, str] | None:
        found = [(text.find(stop, max(0, unsearched + 1 - len(stop))), stop) for stop in self._stops]
        matches = [(start, stop) for start, stop in found if start >= 0]
        return min(matches, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-length] in self._firsts:
                end = text[-length:]
                if any(stop.startswith(end) for stop in self._stops):
                    return length
        return 0
