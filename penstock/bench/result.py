"""What both benchmarks do with an `LLM` and a result: build one, check lengths, statistics, write JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.bench.config import BenchConfig
from penstock.bench.output_file import prepare, write
from penstock.bench.serving_metrics import percentile
from penstock.common.errors import ConfigError
from penstock.common.sampling import SamplingParams
from penstock.llm import LLM

PERCENTAGES = (10, 25, 50, 75, 90, 99)


def build(config: BenchConfig) -> LLM:
    """The engine to measure; says how long it took to be ready.

    Raises:
        ConfigError: an option does not fit the model or the machine, or the result could not be written.
    """
    if config.output_json:
        prepare(Path(config.output_json))
    begun = time.perf_counter()
    llm = LLM(**config.llm_options())
    print(f"Ready after {time.perf_counter() - begun:.1f} s: {llm.describe()}", flush=True)
    return llm


def sampling(config: BenchConfig, output_len: int) -> SamplingParams:
    """As vLLM's benchmarks sample: unfiltered, to the full length."""
    return SamplingParams(n=config.n, max_tokens=output_len, ignore_eos=True, detokenize=not config.disable_detokenize)


def check_length(llm: LLM, input_len: int, output_len: int) -> None:
    """Refuse work that would be cut off.

    Raises:
        ConfigError: prompt and output together are longer than the engine's context.
    """
    if input_len + output_len > llm.max_model_len:
        raise ConfigError(
            f"a request of {input_len} + {output_len} tokens is longer than the engine's context of "
            f"{llm.max_model_len}: raise max_model_len or shorten the requests"
        )


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """The usual percentiles, linear between the two nearest values."""
    return {percentage: percentile(values, percentage) for percentage in PERCENTAGES}


def write_json(path: str, result: Mapping[str, Any]) -> None:
    """Write a result. Without a path, nothing. Raises ConfigError."""
    if path:
        write(Path(path), json.dumps(result, indent=4) + "\n")
