"""Requests to measure with: random ones, those of a file, or random ones of lengths and shared pages that a file tells.

Both kinds of benchmark draw from here: `throughput` (its engine's own tokens) and `serve` (questions.py). Only `read`
opens files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.common.errors import ConfigError
from penstock.simulate import trace
from penstock.simulate.trace import TracedRequest

if TYPE_CHECKING:  # the options import this file: --help must not pay for the tokenizers
    from penstock.common.tokenizer import Tokenizer

DATASETS = ("random", "sharegpt", "prefix_repetition", "custom", "trace", "lengths")
TRACE_PAGE_TOKENS = 512  # of Mooncake's traces
CUSTOM_OUTPUT = 256  # vLLM's default for prompts of a file
# vLLM's rules of which conversations count.
MIN_TOKENS = 4
MAX_PROMPT_TOKENS = 1024
MAX_TOTAL_TOKENS = 2048


@dataclass(frozen=True)
class Sample:
    """One request: a prompt and how many tokens to generate."""

    prompt_token_ids: list[int]  # [] where there is only text: no tokenizer is here
    output_len: int
    text: str | None = None
    at_s: float = 0.0  # when the trace has it sent


def random_samples(
    ids: Sequence[int],
    number: int,
    *,
    input_len: int,
    output_len: int,
    prefix_len: int,
    ratios: tuple[float, float],
    chooser: random.Random,
) -> list[Sample]:
    """Random prompts behind one shared prefix; lengths are uniform in length * (1 +- ratio)."""
    prefix = chooser.choices(ids, k=prefix_len)
    drawn = []
    for _ in range(number):
        own, wanted = _near(input_len, ratios[0], chooser), _near(output_len, ratios[1], chooser)
        drawn.append(Sample(prefix + chooser.choices(ids, k=own), wanted))
    return drawn


def prefix_repetition(
    ids: Sequence[int],
    number: int,
    *,
    prefix_len: int,
    suffix_len: int,
    num_prefixes: int,
    output_len: int,
    chooser: random.Random,
) -> list[Sample]:
    """Each of some prefixes about equally often, in random order, with an end of its own."""
    prefixes = [chooser.choices(ids, k=prefix_len) for _ in range(num_prefixes)]
    order = [prefixes[i % num_prefixes] for i in range(number)]
    chooser.shuffle(order)
    return [Sample(prefix + chooser.choices(ids, k=suffix_len), output_len) for prefix in order]


def with_lengths(
    found: Any, ids: Sequence[int], number: int, output_len: int | None, chooser: random.Random
) -> list[Sample]:
    """Random prompts of the lengths in a list of [input, output] pairs, in its order.

    Raises:
        ConfigError: it is not such a list.
    """
    if not isinstance(found, list) or not found or not all(_is_pair(pair) for pair in found):
        raise ConfigError("a lengths dataset must be a JSON list of [input tokens, output tokens], each at least 1")
    return [Sample(chooser.choices(ids, k=pair[0]), output_len or pair[1]) for pair in found[:number]]


def sharegpt(
    found: Any, tokenizer: Tokenizer, number: int, output_len: int | None, chooser: random.Random
) -> list[Sample]:
    """The first turn of conversations as prompt, the length of the second as output length, in random order.

    As in vLLM, prompts beyond 1024 tokens, requests beyond 2048, and what is shorter than 4 are left out.

    Raises:
        ConfigError: not a list of {"conversations": [{"value": ...}, ...]}, or none that counts.
    """
    if not isinstance(found, list):
        raise ConfigError('a sharegpt dataset must be a JSON list of {"conversations": [{"value": "..."}, ...]}')
    conversations = [entry["conversations"] for entry in found if isinstance(entry, dict) and "conversations" in entry]
    usable = [turns for turns in conversations if isinstance(turns, list) and len(turns) >= 2]
    chooser.shuffle(usable)
    kept: list[Sample] = []
    for turns in usable:
        if len(kept) == number:
            break
        try:
            prompt, answer = _text(str(turns[0]["value"])), _text(str(turns[1]["value"]))
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"a turn of a sharegpt dataset has no value that is text: {str(turns[:2])[:100]!a}"
            ) from None
        ids = tokenizer.encode(prompt)
        wanted = output_len or len(tokenizer.encode(answer))
        long_enough = len(ids) >= MIN_TOKENS and (output_len is not None or wanted >= MIN_TOKENS)
        if long_enough and len(ids) <= MAX_PROMPT_TOKENS and len(ids) + wanted <= MAX_TOTAL_TOKENS:
            kept.append(Sample(ids, wanted, prompt))
    if not kept:
        raise ConfigError("no conversation of the sharegpt dataset has a length that counts")
    return kept


def custom(text: str, tokenizer: Tokenizer | None, number: int, output_len: int | None) -> list[Sample]:
    """The first `number` lines of {"prompt": "...", "output_tokens": N}; the length may be missing.

    Raises:
        ConfigError: a line is something else.
    """
    kept: list[Sample] = []
    for place, line in enumerate(text.split("\n"), 1):  # splitlines() would part what JSON may hold, as U+2028
        if not line.strip() or len(kept) == number:
            continue
        try:
            entry = json.loads(line)
            prompt, wanted = entry["prompt"], output_len or int(entry.get("output_tokens") or CUSTOM_OUTPUT)
            if not isinstance(prompt, str) or wanted < 1:
                raise ValueError("prompt is no text, or output_tokens below 1")
            _text(prompt)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f'line {place} of a custom dataset must be {{"prompt": "..."}}: {type(error).__name__} {error}'
            ) from None
        kept.append(Sample(tokenizer.encode(prompt) if tokenizer else [], wanted, prompt))
    return kept


def traced(
    requests: Iterable[TracedRequest], ids: Sequence[int], number: int, page_tokens: int, output_len: int | None
) -> list[Sample]:
    """Prompts of a trace's lengths, sent at its times: pages with the same name are the same tokens.

    Where a trace names no pages, all prompts differ.
    """
    kept: list[Sample] = []
    for request in requests:
        if len(kept) == number:
            break
        count = -(-request.prompt_tokens // page_tokens)
        names = request.pages or [f"{len(kept)}.{page}" for page in range(count)]
        prompt = [token for name in names for token in random.Random(f"page {name}").choices(ids, k=page_tokens)]
        wanted = output_len or request.output_tokens
        kept.append(Sample(prompt[: request.prompt_tokens], wanted, at_s=request.arrival_ms / 1e3))
    return kept


def read_trace(path: str, page_tokens: int, max_len: int | None) -> list[TracedRequest]:
    """The requests of a Mooncake or Azure trace that have at most `max_len` tokens, prompt and output, from time 0.

    Raises:
        ConfigError: it cannot be read, is no trace, or has none as short.
    """
    found = trace.read_trace(path, page_tokens)
    kept = [r for r in found if max_len is None or r.prompt_tokens + r.output_tokens <= max_len]
    if not kept:
        raise ConfigError(f"{path} has no request of at most {max_len} tokens")
    return [replace(request, arrival_ms=request.arrival_ms - kept[0].arrival_ms) for request in kept]


def read(path: str) -> str:
    """A dataset's file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"dataset {path} cannot be read: {error}") from error


def read_json(path: str) -> Any:
    """A dataset's file, parsed.

    Raises:
        ConfigError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"dataset {path} cannot be read: {error}") from error


def _text(text: str) -> str:
    """The text itself; JSON can also hold half a surrogate pair: ValueError."""
    text.encode()
    return text


def _near(length: int, ratio: float, chooser: random.Random) -> int:
    """Uniform in length * (1 +- ratio), at least 1."""
    return max(1, chooser.randint(int(length * (1 - ratio)), -int(-length * (1 + ratio) // 1)))


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(value) is int and value >= 1 for value in pair)
