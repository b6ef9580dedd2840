"""Tokens that a request favours or rules out: `logit_bias`, `allowed_token_ids`, `bad_words`.

The same rules for both samplers: engine/sampler.py applies them to a row of logits, engine/batch_state.py writes them
into the sequence's slot on the device. What does not depend on the output is one bias a token; a banned word of several
tokens forbids its last one wherever the output ends in those before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.common.sampling import SamplingParams
from penstock.kernels.filters import NEVER


class TokenRules:
    """The rules of one request; `words` are the banned ones of several tokens."""

    def __init__(self, sampling: SamplingParams) -> None:
        self._bias = sampling.clamped_bias
        self._allowed = sampling.allowed_token_ids
        self._banned = [word[0] for word in sampling.bad_words_token_ids if len(word) == 1]
        self.words = tuple(tuple(word) for word in sampling.bad_words_token_ids if len(word) > 1)
        self.has_bias = bool(self._bias or self._allowed is not None or self._banned)
        self._row: Tensor | None = None

    @classmethod
    def of(cls, sampling: SamplingParams) -> TokenRules | None:
        """None: the request has no such rule."""
        return cls(sampling) if sampling.has_token_rules else None

    def bias_row(self, vocab: int) -> Tensor:
        """What is added to the logits, `[vocab]` float32 on the host, made once; -inf: never to be drawn.

        Ids outside the vocabulary have been refused where the request came in; here they mean nothing.
        """
        if self._row is None or len(self._row) != vocab:
            row = torch.zeros(vocab) if self._allowed is None else torch.full((vocab,), NEVER)
            row[_within(self._allowed or (), vocab)] = 0.0
            if self._bias:  # as many as a vocabulary has: one by one would take a second
                known = torch.tensor(list(self._bias)), torch.tensor(list(self._bias.values()))
                ids, bias = (part[known[0] < vocab] for part in known)
                row.index_add_(0, ids, bias)
            row[_within(self._banned, vocab)] = NEVER
            self._row = row
        return self._row

    def completing(self, tokens: Sequence[int], prompt_len: int) -> set[int]:
        """Tokens that would complete a banned word behind these; the word must begin in the output, as in vLLM."""
        output_len = len(tokens) - prompt_len
        return {
            word[-1]
            for word in self.words
            if output_len >= len(word) - 1 and tuple(tokens[len(tokens) - len(word) + 1 :]) == word[:-1]
        }


def _within(tokens: Sequence[int], vocab: int) -> Tensor:
    ids = torch.tensor(tokens, dtype=torch.int64)
    return ids[ids < vocab]
