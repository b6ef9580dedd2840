"""What `penstock bench serve` asks: samples of a dataset (datasets.py), as text where there is a tokenizer."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.bench import datasets
from penstock.bench.datasets import Sample
from penstock.common.errors import ConfigError
from penstock.common.tokenizer import Tokenizer

DEFAULT_OUTPUT = 128
PLAIN_IDS = range(10, 1000)  # token ids that every vocabulary has, for prompts without a tokenizer


@dataclass(frozen=True)
class Question:
    """What to ask: text, or token ids where the route takes them."""

    prompt: str | list[int]
    prompt_len: int
    output_len: int
    at_s: float = 0.0  # when a trace has it sent


def questions(options: Namespace, model: str) -> tuple[list[Question], list[Question]]:
    """(the questions of the run, those of its warm-up), drawn from the seed.

    Raises:
        ConfigError: the dataset's file or the tokenizer is missing, or cannot be read.
    """
    tokenizer = None if options.skip_tokenizer_init else _tokenizer(options, model)
    if options.backend == "openai-chat" and tokenizer is None and options.dataset_name != "custom":
        raise ConfigError("chat prompts are text, so they need the tokenizer: give --tokenizer FOLDER")
    drawn = _draw(options, tokenizer, options.num_prompts, random.Random(options.seed))
    if not drawn:
        raise ConfigError("the dataset has no prompt that counts")
    warmups = _draw(options, tokenizer, options.num_warmups, random.Random(options.seed + 1))
    return [_asked(sample, tokenizer) for sample in drawn], [_asked(sample, tokenizer) for sample in warmups]


def _draw(options: Namespace, tokenizer: Tokenizer | None, number: int, chooser: random.Random) -> list[Sample]:
    name, output_len, ids = options.dataset_name, options.output_len, _ids(tokenizer)
    if name == "random":
        return datasets.random_samples(
            ids,
            number,
            input_len=options.input_len,
            output_len=output_len or DEFAULT_OUTPUT,
            prefix_len=options.random_prefix_len,
            ratios=(options.random_range_ratio, options.random_range_ratio),
            chooser=chooser,
        )
    if name == "prefix_repetition":
        return datasets.prefix_repetition(
            ids,
            number,
            prefix_len=options.prefix_repetition_prefix_len,
            suffix_len=options.prefix_repetition_suffix_len,
            num_prefixes=options.prefix_repetition_num_prefixes,
            output_len=output_len or DEFAULT_OUTPUT,
            chooser=chooser,
        )
    path = options.dataset_path
    if not path:
        raise ConfigError(f"--dataset-name {name} needs --dataset-path")
    if name == "custom":
        return datasets.custom(datasets.read(path), tokenizer, number, output_len)
    if name == "trace":
        requests = datasets.read_trace(path, options.trace_page_tokens, options.trace_max_len)
        return datasets.traced(requests, ids, number, options.trace_page_tokens, output_len)
    if name == "lengths":
        return datasets.with_lengths(datasets.read_json(path), ids, number, output_len, chooser)
    if tokenizer is None:
        raise ConfigError("a sharegpt dataset is text, so it needs the tokenizer: give --tokenizer FOLDER")
    return datasets.sharegpt(datasets.read_json(path), tokenizer, number, output_len, chooser)


def _asked(sample: Sample, tokenizer: Tokenizer | None) -> Question:
    """Text where there is any, as users send it; that of random tokens may have another number of them by a little."""
    text = sample.text
    if text is None and tokenizer is not None:
        text = tokenizer.decode(sample.prompt_token_ids)
    prompt = sample.prompt_token_ids if text is None else text
    return Question(prompt, len(sample.prompt_token_ids), sample.output_len, sample.at_s)


def _tokenizer(options: Namespace, model: str) -> Tokenizer | None:
    if options.tokenizer:
        return Tokenizer.load(options.tokenizer)
    name = options.model or model
    return Tokenizer.load(name) if (Path(name) / "tokenizer.json").is_file() else None


def _ids(tokenizer: Tokenizer | None) -> Sequence[int]:
    if tokenizer is None:
        return PLAIN_IDS
    return [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
