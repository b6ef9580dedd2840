"""Beam search over scored continuations. Pure: the caller has the beams scored, here is decided which ones go on.

`LLM.beam_search` and the router drive it alike: each running beam is a request for one token with its logprobs, whose
prompt pages all beams share through the prefix cache. The rules are those of Hugging Face's `generate(num_beams=...)`
with early_stopping=False (transformers 5, generation/utils.py): of all continuations the best 2 * width (more with
several end tokens) are looked at; those among the first `width` that end are finished with score = sum of logprobs /
length ** length_penalty; the best `width` that do not end go on, until none could beat the worst that is finished.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from penstock.common.messages import TokenLogprobs
from penstock.common.plain_values import flag, integer, number

MAX_BEAM_WIDTH = 64
MAX_LENGTH_PENALTY = 100.0  # of longer powers float has no room


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """vLLM's fields. `temperature` changes nothing: beams are compared by the model's own logprobs.

    Raises:
        ValueError: a value is of another type, or out of its range; the message names the field.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False  # the text of an end token is part of the text; the token always is there

    def __post_init__(self) -> None:
        for field, plain in _PLAIN.items():
            object.__setattr__(self, field, plain(getattr(self, field), field))
        if not 1 <= self.beam_width <= MAX_BEAM_WIDTH:
            raise ValueError(f"beam_width must be from 1 to {MAX_BEAM_WIDTH}, got {self.beam_width}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not -MAX_LENGTH_PENALTY <= self.length_penalty <= MAX_LENGTH_PENALTY:
            limit = f"in [-{MAX_LENGTH_PENALTY:g}, {MAX_LENGTH_PENALTY:g}]"
            raise ValueError(f"length_penalty must be {limit}, got {self.length_penalty}")


_PLAIN = {
    "beam_width": integer,
    "max_tokens": integer,
    "ignore_eos": flag,
    "temperature": number,
    "length_penalty": number,
    "include_stop_str_in_output": flag,
}


@dataclass(frozen=True)
class Beam:
    """One continuation: its tokens, each with its scores, and the sum of their logprobs."""

    token_ids: tuple[int, ...] = ()
    scores: tuple[TokenLogprobs, ...] = ()
    cum_logprob: float = 0.0

    def followed_by(self, token: int, rank: int, at: TokenLogprobs) -> Beam:
        """The beam with the `rank`-th likeliest token of those that scored it."""
        logprob = at.top_logprobs[rank - 1]
        scores = TokenLogprobs(logprob, rank, at.top_ids, at.top_logprobs)
        return Beam((*self.token_ids, token), (*self.scores, scores), self.cum_logprob + logprob)


@dataclass(frozen=True)
class FinishedBeam:
    """A result; `ended` by an end token, else by its length."""

    beam: Beam
    score: float
    ended: bool


class BeamSearch:
    """The search of one prompt. While `running` is not empty, score every beam of it and call `advance`."""

    def __init__(self, params: BeamSearchParams, end_ids: Collection[int], max_tokens: int) -> None:
        self._params = params
        self._end_ids = frozenset() if params.ignore_eos else frozenset(end_ids)
        self._max_tokens = max_tokens
        self._length = 0
        self.candidates = max(2, 1 + len(self._end_ids)) * params.beam_width  # likeliest tokens to score each beam with
        self.running: list[Beam] = [Beam()]
        self.finished: list[FinishedBeam] = []  # the best first

    def advance(self, scored: Sequence[TokenLogprobs]) -> None:
        """Take the `candidates` likeliest tokens behind each running beam, in their order."""
        width = self._params.beam_width
        self._length += 1
        continuations = [
            beam.followed_by(token, rank, at)
            for beam, at in zip(self.running, scored, strict=True)
            for rank, token in enumerate(at.top_ids, start=1)
        ]
        continuations.sort(key=lambda beam: -beam.cum_logprob)
        best = continuations[: self.candidates]
        last = self._length >= self._max_tokens
        ended = [last or beam.token_ids[-1] in self._end_ids for beam in best]
        penalty = float(self._length) ** self._params.length_penalty
        self.finished += [
            FinishedBeam(beam, beam.cum_logprob / penalty, beam.token_ids[-1] in self._end_ids)
            for beam, ends in zip(best[:width], ended[:width], strict=True)
            if ends
        ]
        self.finished.sort(key=lambda found: -found.score)
        del self.finished[width:]
        self.running = [beam for beam, ends in zip(best, ended, strict=True) if not ends][:width]
        full = len(self.finished) == width
        if full and self.running and self.running[0].cum_logprob / penalty <= self.finished[-1].score:
            self.running = []
