"""What `LLM` and `AsyncLLM` are asked for, made requests: checked, complete and numbered.

Whatever leaves here can be encoded and computed; all that cannot is a ValueError before anything is sent.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import msgspec

from penstock.answers import Choice
from penstock.beams import PromptSearch
from penstock.common.bad_words import bad_word_ids
from penstock.common.beam_search import BeamSearch, BeamSearchParams
from penstock.common.grammar import Grammars
from penstock.common.messages import GenerateRequest
from penstock.common.output_text import OutputText
from penstock.common.plain_values import integer, text
from penstock.common.sampling import MAX_BANNED, SamplingParams
from penstock.prompts import Prompt, Prompts, prompt_list
from penstock.results import CompletionOutput, RequestOutput

LAST_PRIORITY = 2**31 - 1  # as the router's; beyond it everything is as late, or as early


@dataclass(frozen=True)
class ModelLimits:
    """What a request has to keep to."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Intake:
    """Makes the requests of one model. May be called from any thread.

    Args:
        grammars: what compiles forms of outputs; None: whoever computes them will see to it.
        seed: of requests without a seed of their own, with their number; 0: each has a random one.
    """

    def __init__(self, prompts: Prompts, limits: ModelLimits, grammars: Grammars | None, seed: int) -> None:
        self._prompts, self._limits, self._grammars, self._seed = prompts, limits, grammars, seed
        self._numbers = itertools.count()

    def all_choices(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        priority: Sequence[int] | None,
        tokenization: Mapping[str, Any] | None,
    ) -> list[Choice]:
        """The choices of one prompt or several, with parameters for all or for each.

        Raises:
            ValueError: as `choices`, or the numbers of prompts, parameters and priorities differ.
        """
        several = prompt_list(prompts)
        if isinstance(sampling_params, SamplingParams):
            params = [sampling_params] * len(several)
        else:
            params = list(sampling_params)
        if len(params) != len(several):
            raise ValueError(f"{len(several)} prompts, but {len(params)} sampling parameters")
        priorities = [0] * len(several) if priority is None else list(priority)
        if len(priorities) != len(several):
            raise ValueError(f"{len(several)} prompts, but {len(priorities)} priorities")
        each = zip(several, params, priorities, strict=True)
        return [
            choice for prompt, p, first in each for choice in self.choices(prompt, p, first, tokenization=tokenization)
        ]

    def choices(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        request_id: str | None = None,
        tokenization: Mapping[str, Any] | None = None,
    ) -> list[Choice]:
        """The choices of a prompt; they share one `RequestOutput`.

        Raises:
            ValueError: something is of the wrong type, a prompt is empty or too long, or a token id not the model's.
        """
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        rank = max(-LAST_PRIORITY, min(LAST_PRIORITY, integer(priority, "priority")))
        words, ids, salt = self._prompts.tokens(prompt, tokenization)
        ids = self._truncated(ids, params)
        self._check_prompt(ids)
        number = next(self._numbers)
        name = str(number) if request_id is None else text(request_id, "request_id")
        # A client may give an id again while tokens of the request that had it are still on their way.
        unique = name if request_id is None else f"{name}-{number}"
        sampling = self._sampling(params, number, self._limits.max_model_len - len(ids))
        request = RequestOutput(name, words, ids, [CompletionOutput(index=i) for i in range(params.n)])
        return [
            Choice(
                request,
                output,
                self._output_text(sampling, ids),
                GenerateRequest(
                    request_id=unique,
                    choice=output.index,
                    prompt_token_ids=ids,
                    sampling=sampling,
                    eos_token_ids=list(self._limits.eos_token_ids),
                    cache_salt=salt,
                    queue_timeout_s=float("inf"),
                    priority=rank,
                ),
            )
            for output in request.outputs
        ]

    def search(self, prompt: Prompt, params: BeamSearchParams) -> PromptSearch:
        """The beam search from a prompt.

        Raises:
            ValueError: as `choices`.
        """
        _, ids, salt = self._prompts.tokens(prompt)
        self._check_prompt(ids)
        max_tokens = min(params.max_tokens, self._limits.max_model_len - len(ids))
        return PromptSearch(next(self._numbers), ids, salt, BeamSearch(params, self._limits.eos_token_ids, max_tokens))

    def _truncated(self, ids: list[int], params: SamplingParams) -> list[int]:
        kept, longest = params.truncate_prompt_tokens, self._limits.max_model_len
        if kept is None:
            return ids
        if kept > longest:
            raise ValueError(f"truncate_prompt_tokens must be at most {longest}, the context, got {kept}")
        return ids[-kept:] if kept > 0 else ids[-max(1, longest - max(1, params.max_tokens or 1)) :]

    def _sampling(self, params: SamplingParams, number: int, room: int) -> SamplingParams:
        """The parameters of one choice. They are within the bounds that `params` was checked for: not checked again."""
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        if params.structured_outputs is not None and self._grammars is not None:
            self._grammars.compile(params.structured_outputs).result()
        max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        sampling = copy(params)
        for field, value in (
            ("seed", self._fresh_seed(number) if params.seed is None else params.seed),
            ("n", 1),
            ("bad_words_token_ids", self._bad_word_ids(params)),
            ("max_tokens", max_tokens),
            ("min_tokens", min(params.min_tokens, max_tokens)),
        ):
            msgspec.structs.force_setattr(sampling, field, value)
        named, largest = sampling.largest_rule_id()
        self._check_ids([largest] if named else [], named)
        return sampling

    def _bad_word_ids(self, params: SamplingParams) -> list[list[int]]:
        """The banned words as tokens, those that were given as tokens included."""
        if not params.bad_words:
            return params.bad_words_token_ids
        tokenizer = self._prompts.tokenizer
        words = bad_word_ids(params.bad_words, lambda word: tokenizer.encode(word, add_special_tokens=False))
        banned = [*params.bad_words_token_ids, *words]
        if len(banned) > MAX_BANNED:  # each was within its bounds
            both = "bad_words and bad_words_token_ids"
            raise ValueError(f"{both} must be at most {MAX_BANNED} sequences together, got {len(banned)}")
        return banned

    def _fresh_seed(self, number: int) -> int:
        if self._seed:
            return (self._seed * 0x9E3779B97F4A7C15 + number) % 2**63
        return int.from_bytes(os.urandom(8), "little") >> 1

    def _output_text(self, sampling: SamplingParams, prompt_ids: Sequence[int]) -> OutputText | None:
        """What makes the text of a choice; None where no text is wanted (stop strings want it, see SamplingParams)."""
        if not sampling.detokenize or not (self._prompts.has_tokenizer or sampling.stop):
            return None
        return OutputText(self._prompts.tokenizer, sampling, prompt_ids)

    def _check_prompt(self, ids: Sequence[int]) -> None:
        longest = self._limits.max_model_len - 1
        if not 0 < len(ids) <= longest:
            raise ValueError(f"a prompt must have from 1 to {longest} tokens here, this one has {len(ids)}")
        self._check_ids(ids, "a prompt")

    def _check_ids(self, token_ids: Sequence[int], what: str) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._limits.vocab_size:
            raise ValueError(f"{what} must hold token ids from 0 to {self._limits.vocab_size - 1}")
