"""Tokens to shown text: kept counts, stop strings over tokens, stop tokens, offsets."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from penstock.common.messages import Finish
from penstock.common.output_text import OutputText
from penstock.common.sampling import SamplingParams
from tests.tiny_tokenizers import byte_level

LENGTH = Finish(reason="length")
EOS = 2


def ids_of(text: str) -> list[int]:
    return byte_level().encode(text, add_special_tokens=False)


@given(
    st.text(alphabet="ab 😀漢", max_size=20),
    st.lists(st.text(alphabet="ab 😀漢", min_size=1, max_size=3), max_size=2),
    st.lists(st.integers(0, 60)),
    st.integers(0, 4),
)
def test_the_cut_of_the_pushes_does_not_matter(text: str, stops: list[str], cuts: list[int], min_tokens: int) -> None:
    sampling = SamplingParams(stop=stops, min_tokens=min_tokens, max_tokens=200)
    ids = ids_of(text)
    whole = OutputText(byte_level(), sampling)
    expected = whole.push(ids, LENGTH)
    parts = OutputText(byte_level(), sampling, track_offsets=True)
    edges = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    shown = "".join(parts.push(ids[a:b]) for a, b in itertools.pairwise(edges)) + parts.push([], LENGTH)
    assert shown == expected
    assert (parts.num_tokens, parts.finish_reason, parts.stop_reason) == (
        whole.num_tokens, whole.finish_reason, whole.stop_reason,
    )  # fmt: skip
    if not stops:
        assert expected == text


def test_overshoot_is_neither_shown_nor_counted() -> None:
    text = OutputText(byte_level(), SamplingParams(stop=["😀"]))
    ids = ids_of("a😀bcd")
    assert text.push(ids) == "a"
    assert (text.kept, text.num_tokens, text.finish_reason, text.stop_reason) == (5, 5, "stop", "😀")
    assert text.push(ids, LENGTH) == ""
    assert (text.kept, text.num_tokens, text.finish_reason) == (0, 5, "stop")


def test_a_stop_token_is_counted_but_not_shown() -> None:
    stop = Finish(reason="stop", stop_reason=ids_of("b")[0])
    hidden = OutputText(byte_level(), SamplingParams(), [5])
    assert hidden.push([*ids_of("a"), *ids_of("b")], stop) == "a"
    assert (hidden.num_tokens, hidden.finish_reason, hidden.stop_reason) == (2, "stop", stop.stop_reason)
    shown = OutputText(byte_level(), SamplingParams(include_stop_str_in_output=True))
    assert shown.push([*ids_of("a"), *ids_of("b")], stop) == "ab"
    eos = OutputText(byte_level(), SamplingParams(skip_special_tokens=False))
    assert eos.push([*ids_of("a"), EOS], Finish(reason="stop")) == "a"


def test_text_of_the_first_min_tokens_is_not_searched() -> None:
    text = OutputText(byte_level(), SamplingParams(stop=["x"], min_tokens=3))
    assert text.push([i for c in "xxxaxb" for i in ids_of(c)]) == "xxxa"
    assert text.num_tokens == 5


def test_a_stop_string_may_begin_in_the_first_min_tokens() -> None:
    text = OutputText(byte_level(), SamplingParams(stop=["b", "bcd"], min_tokens=2))
    assert text.push([i for c in "abcdefgh" for i in ids_of(c)]) == "a"
    assert (text.num_tokens, text.stop_reason) == (4, "bcd")


def test_offsets_count_characters_of_the_output() -> None:
    text = OutputText(byte_level(), SamplingParams(stop=["zz"]), track_offsets=True)
    text.push(ids_of("a😀"))
    assert text.offsets == [0, 1, 1, 1, 1]
    text.push(ids_of("b"))
    assert text.offsets == [2]


def test_held_text_comes_at_the_end() -> None:
    text = OutputText(byte_level(), SamplingParams(stop=["abc"]))
    assert text.push(ids_of("ab")) == ""
    assert text.push(ids_of("😀")[:2], LENGTH) == "ab\ufffd"
