"""Stop strings are found wherever they span; nothing after one is shown; nothing is held without need."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.stop_strings import StopStrings

LETTERS = st.text(alphabet="abc", max_size=24)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3)


def reference(text: str, stops: list[str], include: bool, unsearched: int = 0) -> tuple[str, str | None]:
    """Character by character: the first moment at which the text ends in a stop string; the longest of those."""
    for end in range(unsearched + 1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(LETTERS, STOPS, st.lists(st.integers(0, 24)), st.booleans())
def test_any_cut_gives_what_the_reference_gives(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    scanner = StopStrings(stops, include)
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    shown = ""
    for start, end in itertools.pairwise(edges):
        emitted, matched = scanner.push(text[start:end])
        shown += emitted
        assert reference(text, stops, include)[0].startswith(shown)  # never more than the answer
        if matched is None:  # never more held than needed
            assert end - len(shown) < max(map(len, stops))
    shown += scanner.finish()
    assert (shown, scanner.matched) == reference(text, stops, include)


@given(LETTERS, STOPS, st.lists(st.integers(0, 24)), st.booleans(), st.integers(0, 24))
def test_no_match_ends_in_text_that_is_not_searched(
    text: str, stops: list[str], cuts: list[int], include: bool, unsearched: int
) -> None:
    scanner, unsearched = StopStrings(stops, include), min(unsearched, len(text))
    edges = sorted({0, *(min(c, len(text)) for c in cuts), unsearched, len(text)})
    pieces = [scanner.push(text[a:b], searched=a >= unsearched)[0] for a, b in itertools.pairwise(edges)]
    assert ("".join(pieces) + scanner.finish(), scanner.matched) == reference(text, stops, include, unsearched)


def test_only_what_may_begin_a_stop_is_held() -> None:
    scanner = StopStrings(["\n\nUser:"])
    assert scanner.push("Hello.") == ("Hello.", None)
    assert scanner.push("\n") == ("", None)
    assert scanner.push("\nYou") == ("\n\nYou", None)
    assert scanner.push("\n\nUs") == ("", None)
    assert scanner.push("er: hi") == ("", "\n\nUser:")
    assert scanner.push("more") == ("", "\n\nUser:")
    assert scanner.finish() == ""


@pytest.mark.parametrize("include", [True, False])
def test_no_stops_passes_all(include: bool) -> None:
    assert StopStrings([], include).push("text") == ("text", None)
