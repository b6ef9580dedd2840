"""Banned words as tokens. Pure; used where text is known: the router and `LLM`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAX_BAD_WORD_TOKENS = 32  # kernels/sample_row.py keeps as many tokens of an output


def bad_word_ids(words: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Token sequences that spell the words: at the start of a text, and behind a space.

    The form behind a space counts unless it ends in the other one, which then rules it out, too. vLLM also asks that
    both have as many tokens, and so lets " the" pass where "the" has two and " the" has one.

    Args:
        encode: text to ids, without special tokens.

    Raises:
        ValueError: a word has no tokens, or too many.
    """
    found: list[list[int]] = []
    for word in words:
        bare = word.lstrip()
        plain, spaced = encode(bare), encode(" " + bare)
        if not plain or len(plain) > MAX_BAD_WORD_TOKENS:
            raise ValueError(f"bad_words must be words of 1 to {MAX_BAD_WORD_TOKENS} tokens, {word!r} has {len(plain)}")
        found.append(plain)
        if spaced[-len(plain) :] != plain and len(spaced) <= MAX_BAD_WORD_TOKENS:
            found.append(spaced)
    return found
