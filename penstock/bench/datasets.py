"""Requests to measure with: random ones, those of a ShareGPT file, or random ones of lengths that a file gives."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.bench.config import ThroughputConfig
from penstock.common.errors import ConfigError
from penstock.common.tokenizer import Tokenizer

if TYPE_CHECKING:
    from penstock.llm import LLM

# vLLM's rules of which conversations count.
MIN_TOKENS = 4
MAX_PROMPT_TOKENS = 1024
MAX_TOTAL_TOKENS = 2048


@dataclass(frozen=True)
class Sample:
    """One request: a prompt and how many tokens to generate."""

    prompt_token_ids: list[int]
    output_len: int


def samples(config: ThroughputConfig, llm: LLM, number: int, generator: random.Random) -> list[Sample]:
    """`number` requests of the configured dataset; fewer if it holds fewer.

    Raises:
        ConfigError: the file cannot be read, or is not what `dataset_name` says.
    """
    if number == 0:
        return []
    if config.kind == "sharegpt":
        return sharegpt(_read(config.path), llm.get_tokenizer(), number, config.output_len, generator)
    ids = _plain_ids(llm)
    if config.kind == "lengths":
        return with_lengths(_read(config.path), ids, number, config.output_len, generator)
    prefix = generator.choices(ids, k=config.prefix_length)
    drawn = []
    for _ in range(number):
        input_len = _near(config.input_length, config.range_ratios[0], generator)
        output_len = _near(config.output_length, config.range_ratios[1], generator)
        drawn.append(Sample(prefix + generator.choices(ids, k=input_len), output_len))
    return drawn


def with_lengths(
    found: Any, ids: list[int], number: int, output_len: int | None, generator: random.Random
) -> list[Sample]:
    """Random prompts of the lengths in a list of [input, output] pairs, in its order.

    Raises:
        ConfigError: it is not such a list.
    """
    if not isinstance(found, list) or not found or not all(_is_pair(pair) for pair in found):
        raise ConfigError("a lengths dataset must be a JSON list of [input tokens, output tokens], each at least 1")
    return [Sample(generator.choices(ids, k=pair[0]), output_len or pair[1]) for pair in found[:number]]


def sharegpt(
    found: Any, tokenizer: Tokenizer, number: int, output_len: int | None, generator: random.Random
) -> list[Sample]:
    """The first turn of conversations as prompt, the length of the second as output length, in random order.

    As in vLLM, prompts beyond 1024 tokens, requests beyond 2048, and what is shorter than 4 are left out.

    Raises:
        ConfigError: not a list of {"conversations": [{"value": ...}, ...]}, or none that counts.
    """
    if not isinstance(found, list):
        raise ConfigError('a sharegpt dataset must be a JSON list of {"conversations": [{"value": "..."}, ...]}')
    conversations = [entry["conversations"] for entry in found if isinstance(entry, dict) and "conversations" in entry]
    usable = [turns for turns in conversations if len(turns) >= 2]
    generator.shuffle(usable)
    kept: list[Sample] = []
    for turns in usable:
        if len(kept) == number:
            break
        try:
            prompt, answer = str(turns[0]["value"]), str(turns[1]["value"])
        except (KeyError, TypeError):
            raise ConfigError(f"a turn of a sharegpt dataset has no value: {str(turns[:2])[:100]}") from None
        ids = tokenizer.encode(prompt)
        wanted = output_len or len(tokenizer.encode(answer))
        long_enough = len(ids) >= MIN_TOKENS and (output_len is not None or wanted >= MIN_TOKENS)
        if long_enough and len(ids) <= MAX_PROMPT_TOKENS and len(ids) + wanted <= MAX_TOTAL_TOKENS:
            kept.append(Sample(ids, wanted))
    if not kept:
        raise ConfigError("no conversation of the sharegpt dataset has a length that counts")
    return kept


def _plain_ids(llm: LLM) -> list[int]:
    """Token ids to draw from: without the special ones, where a tokenizer tells which they are."""
    special = llm.get_tokenizer().special_ids if llm.has_tokenizer else frozenset()
    return [i for i in range(llm.vocab_size) if i not in special]


def _near(length: int, ratio: float, generator: random.Random) -> int:
    """Uniform in length * (1 +- ratio), at least 1."""
    return max(1, generator.randint(int(length * (1 - ratio)), -int(-length * (1 + ratio) // 1)))


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(value) is int and value >= 1 for value in pair)


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"dataset {path} cannot be read: {error}") from error
