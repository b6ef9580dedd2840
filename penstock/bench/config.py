"""What `penstock bench` can be told: the engine's options, and those of each benchmark, by vLLM's names.

Flags of vLLM that mean nothing here are refused by name, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from penstock.bench.datasets import DATASETS, TRACE_PAGE_TOKENS
from penstock.common.config import EngineConfig, FleetConfig, option
from penstock.common.errors import ConfigError

# Fleet options mean nothing to an engine in this process; a file or environment that holds them is fine.
HIDDEN = ("redis_url", "namespace", "cluster_key", "lease_s", "served_model_name")

_WHY_NOT = {
    "--async-engine": "offline benchmarks call LLM.generate",
    "--prequeue-requests": "all requests are queued before the first step anyway",
    "--lora-path": "LoRA adapters are not supported",
}


@dataclass(frozen=True, kw_only=True)
class BenchConfig(EngineConfig, FleetConfig):
    """What both benchmarks share."""

    tokenizer: str = option("", "where the tokenizer is, if not with the model")
    skip_tokenizer_init: bool = option(False, "read no tokenizer: prompts are token ids, and no text is made")
    disable_detokenize: bool = option(False, "make no text of the outputs")
    n: int = option(1, "outputs per prompt")
    output_json: str = option("", "file for the result, with vLLM's keys")
    profile: bool = option(False, "profile one run instead of timing: kernels by time, host time of a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "n")

    def llm_options(self) -> dict[str, Any]:
        """Keyword arguments of `LLM`."""
        engine = {f.name: getattr(self, f.name) for f in fields(EngineConfig)}
        return engine | {"tokenizer": self.tokenizer or None, "skip_tokenizer_init": self.skip_tokenizer_init}


@dataclass(frozen=True, kw_only=True)
class LatencyConfig(BenchConfig):
    """`penstock bench latency`: one batch, over and over."""

    input_len: int = option(32, "tokens of a prompt")
    output_len: int = option(128, "tokens of an output")
    batch_size: int = option(8, "prompts in the batch")
    num_iters_warmup: int = option(10, "runs that do not count")
    num_iters: int = option(30, "runs that count")
    use_beam_search: bool = option(False, "search with n beams instead of sampling n outputs")
    enable_prefix_caching: bool = option(False, "keep pages of earlier runs: every run but the first skips its prompts")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "input_len", "output_len", "batch_size", "num_iters")
        _at_least(self, 0, "num_iters_warmup")


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig(BenchConfig):
    """`penstock bench throughput`: many requests at once."""

    backend: str = option("vllm", "whose name LLM goes by: the engine in this process", choices=("vllm",))
    dataset_name: str = option("sharegpt", "what dataset_path is; without a path it is random", choices=DATASETS)
    dataset_path: str = option(
        "", "ShareGPT conversations; lines of prompts (custom); a trace; a list of [input, output] lengths"
    )
    dataset: str = option("", "the same as dataset_path", excludes="dataset_path")
    num_prompts: int = option(1000, "requests; fewer where the dataset has fewer")
    num_warmups: int = option(0, "other requests to run first, which do not count")
    input_len: int | None = option(None, "tokens of a random prompt (default: 1024)")
    output_len: int | None = option(None, "tokens of each output; default: the dataset's, 128 where random")
    prefix_len: int = option(0, "tokens that all random prompts begin with, before their own")
    random_input_len: int | None = option(None, "the same as input_len", excludes="input_len")
    random_output_len: int | None = option(None, "the same as output_len, where random", excludes="output_len")
    random_prefix_len: int | None = option(None, "the same as prefix_len")
    random_range_ratio: str = option(
        "0.0", 'spread of random lengths: uniform in length * (1 +- ratio), or {"input": 0.3, "output": 0.5}'
    )
    prefix_repetition_prefix_len: int = option(256, "tokens of a prefix that many prompts share")
    prefix_repetition_suffix_len: int = option(256, "tokens of a prompt after it")
    prefix_repetition_num_prefixes: int = option(10, "different prefixes")
    prefix_repetition_output_len: int = option(128, "tokens of each output, if output_len does not say it")
    trace_page_tokens: int = option(TRACE_PAGE_TOKENS, "tokens that one hash of a trace stands for")
    trace_max_len: int | None = option(None, "longest request of a trace that counts, in tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "num_prompts", "input_length", "output_length")
        _at_least(self, 0, "num_warmups", "prefix_length")
        _at_least(self, 1, *(f"prefix_repetition_{name}" for name in ("suffix_len", "num_prefixes", "output_len")))
        _at_least(self, 1, "trace_page_tokens")
        _at_least(self, 0, "prefix_repetition_prefix_len")
        if self.dataset_name in ("lengths", "custom", "trace") and not self.path:
            raise ConfigError(f"dataset_name {self.dataset_name} needs dataset_path")
        if self.kind != "random":
            given = [name for name in ("input_len", "random_input_len", "random_output_len") if getattr(self, name)]
            given += ["prefix_len"] if self.prefix_length else []
            if given:
                raise ConfigError(f"{given[0]} is for random prompts, and the dataset is {self.kind}")
        if self.kind in ("sharegpt", "custom") and self.skip_tokenizer_init:
            raise ConfigError(f"a {self.kind} dataset is text: it needs the tokenizer (skip_tokenizer_init is set)")
        _ = self.range_ratios

    @property
    def path(self) -> str:
        return self.dataset_path or self.dataset

    @property
    def kind(self) -> str:
        """The dataset used: as in vLLM, random without a path."""
        return self.dataset_name if self.path or self.dataset_name == "prefix_repetition" else "random"

    @property
    def input_length(self) -> int:
        """Tokens of a random prompt after its prefix."""
        return _first(self.random_input_len, self.input_len, 1024)

    @property
    def output_length(self) -> int:
        """Tokens of a random prompt's output."""
        return _first(self.random_output_len, self.output_len, 128)

    @property
    def prefix_length(self) -> int:
        return _first(self.random_prefix_len, self.prefix_len)

    @property
    def range_ratios(self) -> tuple[float, float]:
        """Spread of random input and output lengths."""
        try:
            found = json.loads(self.random_range_ratio)
            values = (found["input"], found["output"]) if isinstance(found, dict) else (found, found)
            ratios = float(values[0]), float(values[1])
        except (ValueError, KeyError, TypeError):
            ratios = (-1.0, -1.0)
        if not (0.0 <= ratios[0] < 1.0 and 0.0 <= ratios[1] < 1.0):
            raise ConfigError(
                'random_range_ratio must be a number in [0, 1) or {"input": X, "output": Y}, '
                f"got {self.random_range_ratio!r}"
            )
        return ratios


def refuse_vllm_only(arguments: Sequence[str]) -> None:
    """Say why a flag of vLLM's benchmarks cannot be had; those of its engine and others are the loader's to report.

    Raises:
        ConfigError: there is one among the arguments.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        flag = name.replace("_", "-")
        if flag in _WHY_NOT:
            raise ConfigError(f"vLLM's {name} is not supported: {_WHY_NOT[flag]}")


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(config, name)}")
