"""What a client may ask of sampling. Used by `LLM`, by the router, and sent to the workers as it is.

Field names, defaults and rules follow vLLM's `SamplingParams`. Workers ignore the text-level fields (`stop`,
`include_stop_str_in_output`, `skip_special_tokens`, `detokenize`, `bad_words`, `truncate_prompt_tokens`): they know
tokens only.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import msgspec

from penstock.common.bad_words import MAX_BAD_WORD_TOKENS
from penstock.common.plain_values import (
    Plain,
    biases,
    flag,
    integer,
    integers,
    make_plain,
    number,
    texts,
    unless_none,
)
from penstock.common.structured_outputs import StructuredOutputsParams

GREEDY_BELOW = 1e-5
MAX_TEMPERATURE = 100.0  # beyond, every token is equally likely, and float32 overflows
MAX_REPETITION_PENALTY = 100.0
MIN_TEMPERATURE = 0.01
MAX_N = 16384
MAX_BIAS = 100.0  # larger ones are cut to it, as in vLLM
MAX_BAD_WORDS = 128
MAX_BANNED = 2 * MAX_BAD_WORDS  # sequences of tokens, two a word; kernels/sample_row.py has room for as many
MAX_COUNT = 2**31 - 1  # of tokens: more than any model has; what asks for more is cut to it


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens and when to stop. Values of other types that mean the same, such as numpy's, become these.

    Raises:
        ValueError: a value is of no such type, or out of its range; the message names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # of the prompt's tokens; such a request reads nothing from the prefix cache
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    logit_bias: dict[int, float] | None = None  # token id -> added to its logit
    allowed_token_ids: list[int] | None = None  # all others are never drawn
    bad_words: list[str] = []
    truncate_prompt_tokens: int | None = None  # keep the last so many; -1: as many as the context has room for
    structured_outputs: StructuredOutputsParams | None = None  # the form of the output
    bad_words_token_ids: list[list[int]] = []  # set from `bad_words` by whoever has the tokenizer

    def __post_init__(self) -> None:
        make_plain(self, _PLAIN)
        _check(1 <= self.n <= MAX_N, "n", f"from 1 to {MAX_N}", self.n)
        _check(
            0.0 <= self.temperature <= MAX_TEMPERATURE, "temperature", f"in [0, {MAX_TEMPERATURE:g}]", self.temperature
        )
        _check(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]", self.top_p)
        _check(self.top_k >= -1, "top_k", "-1 or 0 (off), or at least 1", self.top_k)
        _check(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]", self.min_p)
        _check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]", self.presence_penalty)
        _check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]", self.frequency_penalty)
        lowest, highest = 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        allowed = lowest <= self.repetition_penalty <= highest
        _check(allowed, "repetition_penalty", f"in [{lowest:g}, {highest:g}]", self.repetition_penalty)
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer", self.seed)
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _check(self.min_tokens >= 0, "min_tokens", "at least 0", self.min_tokens)
        if self.max_tokens is not None:
            _check(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                f"at most max_tokens ({self.max_tokens})",
                self.min_tokens,
            )
        _check(self.logprobs is None or self.logprobs >= 0, "logprobs", "at least 0", self.logprobs)
        asked = self.prompt_logprobs
        _check(asked is None or asked >= 0, "prompt_logprobs", "at least 0", asked)
        kept = self.truncate_prompt_tokens
        _check(kept is None or kept == -1 or kept >= 1, "truncate_prompt_tokens", "-1 or at least 1", kept)
        _check(all(self.stop), "stop", "without empty strings", self.stop)
        _check(not self.stop or self.detokenize, "stop", "used with detokenize=True only", self.stop)
        self._check_token_rules()

    def _check_token_rules(self) -> None:
        if self.logit_bias:
            lowest, biases = min(self.logit_bias), self.logit_bias.values()
            _check(lowest >= 0, "logit_bias", "of token ids", lowest)
            _check(all(map(math.isfinite, biases)), "logit_bias", "of finite numbers", [*biases][:8])
        if self.allowed_token_ids is not None:
            ids = self.allowed_token_ids
            _check(bool(ids) and min(ids) >= 0, "allowed_token_ids", "a list of at least one token id", ids)
        _check(len(self.bad_words) <= MAX_BAD_WORDS, "bad_words", f"at most {MAX_BAD_WORDS}", len(self.bad_words))
        _check(all(word.strip() for word in self.bad_words), "bad_words", "without empty strings", self.bad_words)
        sequences = self.bad_words_token_ids
        in_range = all(0 < len(s) <= MAX_BAD_WORD_TOKENS and min(s) >= 0 for s in sequences)
        rule = f"at most {MAX_BANNED} sequences of 1 to {MAX_BAD_WORD_TOKENS} token ids"
        _check(len(sequences) <= MAX_BANNED and in_range, "bad_words_token_ids", rule, len(sequences))

    def with_seed(self, seed: int) -> SamplingParams:
        """The same with another seed. It was checked: rules of a whole vocabulary are not gone through again."""
        changed = copy(self)
        msgspec.structs.force_setattr(changed, "seed", seed)
        return changed

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken; the filters then have no effect."""
        return self.temperature < GREEDY_BELOW

    @property
    def effective_temperature(self) -> float:
        """Temperature to divide by; tiny values are raised so that float32 does not overflow."""
        return max(self.temperature, MIN_TEMPERATURE)

    @property
    def has_token_rules(self) -> bool:
        """Whether tokens are favoured or ruled out beyond penalties and min_tokens."""
        return bool(self.logit_bias or self.allowed_token_ids is not None or self.bad_words_token_ids)

    @property
    def clamped_bias(self) -> dict[int, float]:
        """`logit_bias` within what OpenAI's API allows."""
        return {token: max(-MAX_BIAS, min(MAX_BIAS, bias)) for token, bias in (self.logit_bias or {}).items()}

    def largest_rule_id(self) -> tuple[str, int]:
        """(field, id) of the largest token id that these rules name, to compare with a vocabulary; -1 without any."""
        named = [("logit_bias", token) for token in self.logit_bias or ()]
        named += [("allowed_token_ids", token) for token in self.allowed_token_ids or ()]
        named += [("bad_words", token) for word in self.bad_words_token_ids for token in word]
        return max(named, key=lambda item: item[1], default=("", -1))


def _check(ok: bool, field: str, rule: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{field} must be {rule}, got {value!r}")


def _count(value: Any, field: str) -> int:
    count = integer(value, field)
    return count if count <= MAX_COUNT else MAX_COUNT


def _seed(value: Any, field: str) -> int | None:
    """-1 means none, as in vLLM."""
    seed = None if value is None else integer(value, field)
    return None if seed == -1 else seed


def _sequences(values: Any, field: str) -> list[list[int]]:
    if type(values) is list and not values:
        return values
    try:
        return [integers(value, field) for value in values]
    except TypeError as error:
        raise ValueError(f"{field} must be lists of token ids: {error}") from None


def _form(value: Any, field: str) -> StructuredOutputsParams:
    if not isinstance(value, StructuredOutputsParams):
        raise ValueError(f"{field} must be StructuredOutputsParams, got {value!r}")
    return value


def _list_of(plain: Plain) -> Plain:
    return lambda value, field: [] if value is None else plain(value, field)  # as in vLLM


_PLAIN: dict[str, Plain] = {
    **dict.fromkeys(("n", "top_k", "min_tokens"), _count),
    **dict.fromkeys(("max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens"), unless_none(_count)),
    **dict.fromkeys(("temperature", "top_p", "min_p"), number),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), number),
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"), flag),
    **dict.fromkeys(("stop", "bad_words"), _list_of(texts)),
    "seed": _seed,
    "stop_token_ids": _list_of(integers),
    "allowed_token_ids": unless_none(integers),
    "logit_bias": unless_none(biases),
    "bad_words_token_ids": _list_of(_sequences),
    "structured_outputs": unless_none(_form),
}
