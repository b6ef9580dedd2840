"""Whatever the cut of the pushes: the joined pieces are the text of all tokens, and no character appears in halves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.detokenizer import Detokenizer
from penstock.common.tokenizer import Tokenizer
from tests.tiny_tokenizers import byte_level, sentencepiece, wordpiece

TEXTS = st.text(alphabet=st.sampled_from("a b the water.ß漢字😀👩‍👩‍👧é\n<|im_end|>"), max_size=30)


def pieces(tokenizer: Tokenizer, pushes: Sequence[Sequence[int]], **options: object) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)  # type: ignore[arg-type]
    return [*(detokenizer.push(ids) for ids in pushes), detokenizer.finish()]


def cut(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.integers(0, 399), max_size=30), st.lists(st.integers(0, 30)), st.booleans())
def test_any_byte_level_tokens_in_any_cut_equal_the_whole(ids: list[int], cuts: list[int], skip: bool) -> None:
    joined = "".join(pieces(byte_level(), cut(ids, cuts), skip_special_tokens=skip))
    assert joined == byte_level().decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["byte-level", "sentencepiece"])
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60)))
def test_pieces_of_real_text_hold_whole_characters_only(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    text = text.replace(" ", "▁") if tokenizer is sentencepiece() else text  # no normaliser in the small one
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(tokenizer, cut(ids, cuts))
    assert "".join(found) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in found)


@given(st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 20)), st.booleans())
def test_wordpiece_in_any_cut_equals_the_whole(ids: list[int], cuts: list[int], skip: bool) -> None:
    joined = "".join(pieces(wordpiece(), cut(ids, cuts), skip_special_tokens=skip))
    assert joined == wordpiece().decode(ids, skip_special_tokens=skip)


def test_an_emoji_over_four_tokens_comes_with_the_last() -> None:
    ids = byte_level().encode("a😀b", add_special_tokens=False)
    assert len(ids) == 6
    assert pieces(byte_level(), [[i] for i in ids]) == ["a", "", "", "", "😀", "b", ""]


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    ids = byte_level().encode("😀", add_special_tokens=False)[:2]
    assert pieces(byte_level(), [ids]) == ["", "\ufffd"]


def test_output_that_continues_a_prompt_keeps_its_space() -> None:
    tokenizer = sentencepiece()
    the = tokenizer._backend.token_to_id("▁the")
    assert pieces(tokenizer, [[the], [the]]) == ["the", " the", ""]
    assert pieces(tokenizer, [[the], [the]], prompt_ids=[the]) == [" the", " the", ""]
    gate = wordpiece()._backend.token_to_id("gate")
    assert pieces(wordpiece(), [[gate]], prompt_ids=[gate]) == [" gate", ""]


def test_wordpiece_without_end_of_broken_text_does_not_hold_for_ever() -> None:
    unknown = byte_level()._backend.token_to_id("Ã")  # a lone first byte of two
    found = pieces(byte_level(), [[unknown]] * 40)
    assert sum(map(len, found[:-1])) >= 38
