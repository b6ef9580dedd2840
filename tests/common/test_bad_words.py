"""Which token sequences a banned word stands for."""

from __future__ import annotations

import pytest

from penstock.common.bad_words import MAX_BAD_WORD_TOKENS, bad_word_ids
from penstock.common.sampling import SamplingParams
from tests.tiny_tokenizers import byte_level


def encode(text: str) -> list[int]:
    return byte_level().encode(text, add_special_tokens=False)


def test_a_word_is_banned_at_the_start_and_behind_a_space() -> None:
    decode = byte_level().decode
    plain, spaced = bad_word_ids(["the"], encode)
    assert (decode(plain), decode(spaced)) == ("the", " the")
    assert bad_word_ids(["  the"], encode) == [plain, spaced]


def test_a_space_that_is_a_token_of_its_own_is_not_a_form() -> None:
    """The word behind it is banned already."""

    def letters(text: str) -> list[int]:
        return [ord(char) for char in text]

    assert bad_word_ids(["ab", "c"], letters) == [[97, 98], [99]]


def test_words_too_long() -> None:
    with pytest.raises(ValueError, match="bad_words must be words of 1 to 32 tokens"):
        bad_word_ids(["水" * MAX_BAD_WORD_TOKENS], encode)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [3, -1]}, "allowed_token_ids"),
        ({"bad_words": ["a", ""]}, "bad_words"),
        ({"bad_words_token_ids": [[]]}, "bad_words_token_ids"),
        ({"bad_words_token_ids": [[1] * 33]}, "bad_words_token_ids"),
        ({"bad_words_token_ids": [[1]] * 257}, "bad_words_token_ids"),
    ],
    ids=str,
)
def test_values_out_of_range(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message} must be"):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_bias_is_cut_to_what_openai_allows() -> None:
    params = SamplingParams(logit_bias={1: 1e9, 2: -101.0, 3: 0.5})
    assert params.clamped_bias == {1: 100.0, 2: -100.0, 3: 0.5}
    assert params.largest_rule_id() == ("logit_bias", 3)
