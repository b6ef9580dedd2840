"""What `penstock bench serve` asks: random prompts, with shared prefixes or not, or those of a file."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.common.errors import ConfigError
from penstock.common.tokenizer import Tokenizer

if TYPE_CHECKING:
    from penstock.bench.client import Question

DATASETS = ("random", "prefix_repetition", "sharegpt", "lengths", "custom")
DEFAULT_OUTPUT = 128
PLAIN_IDS = range(10, 1000)  # token ids that every vocabulary has, for prompts without a tokenizer


def questions(options: Namespace, model: str) -> tuple[list[Question], list[Question]]:
    """(the questions of the run, those of its warm-up), drawn from the seed.

    Raises:
        ConfigError: the dataset's file or the tokenizer is missing, or cannot be read.
    """
    tokenizer = _tokenizer(options, model)
    if options.backend == "openai-chat" and tokenizer is None:
        raise ConfigError("chat prompts are text, so they need the tokenizer: give --tokenizer FOLDER")
    chooser = random.Random(options.seed)
    drawn = _draw(options, tokenizer, options.num_prompts, chooser)
    if not drawn:
        raise ConfigError("the dataset has no prompt that counts")
    return drawn, _draw(options, tokenizer, options.num_warmups, random.Random(options.seed + 1))


def _draw(options: Namespace, tokenizer: Tokenizer | None, number: int, chooser: random.Random) -> list[Question]:
    name, output_len = options.dataset_name, options.output_len
    ids = _ids(tokenizer)
    if name == "random":
        prefix = chooser.choices(ids, k=options.random_prefix_len)
        ratio = options.random_range_ratio
        return [
            _asked(
                prefix + chooser.choices(ids, k=_near(options.input_len, ratio, chooser)),
                _near(output_len or DEFAULT_OUTPUT, ratio, chooser),
                tokenizer,
            )
            for _ in range(number)
        ]
    if name == "prefix_repetition":
        prefixes = [
            chooser.choices(ids, k=options.prefix_repetition_prefix_len)
            for _ in range(options.prefix_repetition_num_prefixes)
        ]
        length, wanted = options.prefix_repetition_suffix_len, output_len or options.prefix_repetition_output_len
        order = [prefixes[i % len(prefixes)] for i in range(number)]
        chooser.shuffle(order)
        return [_asked(prefix + chooser.choices(ids, k=length), wanted, tokenizer) for prefix in order]
    if not options.dataset_path:
        raise ConfigError(f"--dataset-name {name} needs --dataset-path")
    if name == "custom":
        return _custom(options, tokenizer, number)
    from penstock.bench.datasets import sharegpt, with_lengths

    found = _read(options.dataset_path)
    if name == "lengths":
        samples = with_lengths(found, ids, number, output_len, chooser)
    elif tokenizer is None:
        raise ConfigError("a sharegpt dataset is text, so it needs the tokenizer: give --tokenizer FOLDER")
    else:
        samples = sharegpt(found, tokenizer, number, output_len, chooser)
    return [_asked(sample.prompt_token_ids, sample.output_len, tokenizer) for sample in samples]


def _custom(options: Namespace, tokenizer: Tokenizer | None, number: int) -> list[Question]:
    """A JSON object a line, with `prompt` and maybe `output_tokens`."""
    from penstock.bench.client import Question

    asked: list[Question] = []
    try:
        for line in Path(options.dataset_path).read_text(encoding="utf-8").splitlines():
            if line.strip() and len(asked) < number:
                entry = json.loads(line)
                prompt = str(entry["prompt"])
                length = len(tokenizer.encode(prompt)) if tokenizer else 0  # the server's usage says it, too
                wanted = options.output_len or entry.get("output_tokens") or DEFAULT_OUTPUT
                asked.append(Question(prompt, length, int(wanted)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'dataset {options.dataset_path} must hold {{"prompt": "..."}} a line: {type(error).__name__} {error}'
        ) from None
    return asked


def _asked(ids: list[int], output_len: int, tokenizer: Tokenizer | None) -> Question:
    """Text where there is a tokenizer, as users send it; its length in tokens may then be another by a little."""
    from penstock.bench.client import Question

    if tokenizer is None:
        return Question(ids, len(ids), output_len)
    text = tokenizer.decode(ids)
    return Question(text, len(ids), output_len)


def _tokenizer(options: Namespace, model: str) -> Tokenizer | None:
    if options.tokenizer:
        return Tokenizer.load(options.tokenizer)
    return Tokenizer.load(model) if (Path(model) / "tokenizer.json").is_file() else None


def _ids(tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        return list(PLAIN_IDS)
    return [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]


def _near(length: int, ratio: float, chooser: random.Random) -> int:
    """Uniform in length * (1 +- ratio), at least 1."""
    return max(1, chooser.randint(int(length * (1 - ratio)), int(length * (1 + ratio))))


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"dataset {path} cannot be read: {error}") from error
