"""Token ids in, text out, as the tokens come. Pure; used through `OutputText` by the router and by `LLM`.

A character whose bytes are spread over several tokens appears when its last byte is there, never in halves.
Joined pieces equal the decoding of all tokens at once, however the tokens were cut into pushes.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence, Set

from penstock.common.tokenizer import Tokenizer

_CONTEXT_TOKENS = 6  # of the prompt, enough to know whether a space belongs before the next word
_MAX_PENDING = 16  # a broken character is at most 3 tokens; longer runs of U+FFFD are what the model meant
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Decodes the output of one choice.

    `prompt_ids` are the tokens the output continues: with them, a leading space of the first word is kept.
    `shown_ids` are special tokens that are not skipped.
    Invalid UTF-8 becomes U+FFFD. (SentencePiece byte fallback differs from `Tokenizer.decode` in one point: there one
    bad byte spoils the valid characters of its whole run of byte tokens, which cannot be known while streaming.)
    """

    __slots__ = ("_bytes", "_strip", "_texts", "_tokenizer", "_utf8", "_whole", "_window", "skipped")

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown_ids: Set[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self.skipped = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._bytes = tokenizer.byte_tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if self._bytes else None
        self._whole = True  # no character is incomplete
        self._texts = tokenizer.whole_texts if self._bytes else {}
        self._strip = tokenizer.strips_first_space and not prompt_ids
        self._window = None if self._bytes else _Window(tokenizer, [i for i in prompt_ids if i not in self.skipped])

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete; "" while a character is incomplete."""
        if len(token_ids) == 1 and self._whole and not self._strip:  # the hot path
            text = self._texts.get(token_ids[0])
            if text is not None:
                return text
        skipped = self.skipped
        if self._utf8 is None:
            assert self._window is not None
            return self._window.push([i for i in token_ids if i not in skipped])
        piece = self._tokenizer.token_bytes
        text = self._utf8.decode(b"".join([piece(i) for i in token_ids if i not in skipped]))
        self._whole = not self._utf8.getstate()[0]
        return self._strip_first(text) if self._strip else text

    def finish(self) -> str:
        """What was held back: an incomplete character, as U+FFFD."""
        if self._utf8 is None:
            assert self._window is not None
            return self._window.finish()
        return self._strip_first(self._utf8.decode(b"", True))

    def _strip_first(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _Window:
    """Decoding in context: the text of a token depends on its neighbours (WordPiece, Metaspace).

    `ids[start:done]` is context already shown, `ids[done:]` is not shown yet; new text is what the second adds.
    """

    __slots__ = ("_done", "_ids", "_start", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = context[-_CONTEXT_TOKENS:]
        self._start, self._done = 0, len(self._ids)

    def push(self, token_ids: list[int]) -> str:
        shown = []
        for token_id in token_ids:  # one by one, so that the cut of the pushes cannot matter
            self._ids.append(token_id)
            new = self._new_text()
            if new and (not new.endswith(_REPLACEMENT) or len(self._ids) - self._done > _MAX_PENDING):
                shown.append(new)
                self._start, self._done = self._done, len(self._ids)
        del self._ids[: self._start]
        self._done -= self._start
        self._start = 0
        return "".join(shown)

    def finish(self) -> str:
        new = self._new_text()
        self._start, self._done = self._done, len(self._ids)
        return new

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._done], skip_special_tokens=False)
        after = self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=False)
        return after[len(before) :]
