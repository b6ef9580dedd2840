"""`penstock bench latency|throughput|serve`: reads the options and runs one benchmark."""

from __future__ import annotations

import os
from collections.abc import Sequence

from penstock.bench.config import HIDDEN, BenchConfig, LatencyConfig, ThroughputConfig, refuse_vllm_only
from penstock.common import logs
from penstock.common.config_loader import Config, load_config
from penstock.common.errors import ConfigError

USAGE = """\
usage: penstock bench BENCHMARK [MODEL] [options]

Flags and result keys are vLLM's.

benchmarks:
  latency MODEL     time of one batch of equal requests, again and again: the engine in this process
  throughput MODEL  requests and tokens a second when all requests come at once, likewise
  serve             what the clients of a running server see: first token, gaps, rates, goodput

`penstock bench BENCHMARK --help` lists the options.
"""


def run(arguments: Sequence[str]) -> int:
    """Run the benchmark named first and return the exit status.

    Raises:
        ConfigError: no such benchmark, an option that is unknown, out of range or does not fit the model.
        ModelError: the model cannot be loaded.
    """
    if list(arguments[:1]) in ([], ["-h"], ["--help"]):
        print(USAGE, end="")
        return 0 if arguments else 2
    benchmark, rest = arguments[0], arguments[1:]
    if benchmark == "serve":
        from penstock.bench.serve import run_serve

        return run_serve(rest)
    refuse_vllm_only(rest)
    if benchmark == "latency":
        latency = _load(LatencyConfig, "latency", "Time one batch of equal requests.", rest)
        from penstock.bench.latency import run_latency

        run_latency(latency)
    elif benchmark == "throughput":
        throughput = _load(ThroughputConfig, "throughput", "Time many requests that come at once.", rest)
        from penstock.bench.throughput import run_throughput

        run_throughput(throughput)
    else:
        raise ConfigError(f"unknown benchmark {benchmark!r}; there are latency, throughput, serve")
    return 0


def _load(config_class: type[Config], name: str, description: str, arguments: Sequence[str]) -> Config:
    prog = f"penstock bench {name}"
    config = load_config(config_class, arguments, os.environ, prog=prog, description=description, hidden=HIDDEN)
    assert isinstance(config, BenchConfig)
    if not config.model:
        raise ConfigError("MODEL is missing: a Hugging Face directory or hub id")
    logs.setup("bench", config.log_level)
    return config
