"""The options of `penstock bench serve`: vLLM's flags, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence

from penstock.bench.arrivals import STRATEGIES, arrivals, ramp_up
from penstock.bench.datasets import DATASETS, TRACE_PAGE_TOKENS
from penstock.bench.serving_metrics import GOODPUT_METRICS, METRICS
from penstock.client_options import ClientParser, api_key, number, readable, server_url, whole
from penstock.common.bounds import LONGEST_S
from penstock.common.config import LARGEST_PORT
from penstock.common.errors import ConfigError
from penstock.router_specs import reachable_address

BACKENDS = ("openai", "openai-chat", "vllm")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
_REFUSED = {
    "--lora-modules": "LoRA adapters are not supported",
    "--lora-assignment": "LoRA adapters are not supported",
    "--profile": "the server is profiled where it runs",
    "--use-beam-search": "it is not measured",
    "--no-stream": "without a stream there is no first token to measure",
    "--plot-timeline": "ask for the timeline of a request instead (X-Penstock-Timeline), or look at /ui",
    "--timeline-itl-thresholds": "ask for the timeline of a request instead (X-Penstock-Timeline), or look at /ui",
    "--plot-dataset-stats": "--save-detailed has the lengths",
    "--hf-name": "give the data set as a file",
    "--hf-split": "give the data set as a file",
    "--hf-subset": "give the data set as a file",
    "--disable-shuffle": "only sharegpt is shuffled, from --seed",
    "--no-oversample": "no data set is repeated: where it has fewer prompts, fewer are asked",
    "--skip-chat-template": "completions send the prompts of a file as they are; openai-chat has the server's template",
}
SLOWEST_PER_S, FASTEST_PER_S = 1e-6, 1e9  # gaps of 11 days; of a nanosecond


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options.

    Raises:
        ConfigError: unknown, wrong or contradicting.
    """
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in _REFUSED:
            raise ConfigError(f"vLLM's {flag} is not supported: {_REFUSED[flag]}")
    parser = ClientParser("penstock bench serve", "A load on an OpenAI-compatible server, and what its clients saw.")
    _add_server(parser)
    _add_load(parser)
    _add_dataset(parser)
    _add_result(parser)
    _add_matters_of_course(parser)
    options = parser.parse(arguments, os.environ)
    _check(options)
    return options


def _add_server(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--backend", "--endpoint-type", default="openai", choices=BACKENDS, help="openai: completions (also: vllm)")
    add("--base-url", type=server_url, help="instead of host and port")
    add("--host", default="127.0.0.1")
    add("--port", type=whole(1, LARGEST_PORT), default=8000)
    add("--endpoint", help="default: /v1/completions, or /v1/chat/completions")
    add("--api-key", default=api_key(os.environ), help="default: $OPENAI_API_KEY")
    add("--header", nargs="+", default=[], metavar="KEY=VALUE", help="headers of every request")
    add("--insecure", action="store_true", help="do not check the server's certificate")
    add(
        "--ready-check-timeout-sec",
        type=number(0.0, LONGEST_S),
        default=0.0,
        metavar="S",
        help="how long to wait for the server",
    )
    add("--model", help="name to ask for, and the tokenizer; default: the first that the server has")
    add("--served-model-name", help="name to ask for, if it is not --model")


def _add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("load").add_argument
    add("--num-prompts", type=whole(1), default=1000)
    add("--seed", type=int, default=0)
    add(
        "--request-rate",
        type=number(SLOWEST_PER_S),
        default=float("inf"),
        metavar="PER_S",
        help="requests a second; default: all at once, or a trace's own times",
    )
    add("--burstiness", type=number(0.01), default=1.0, help="1: a Poisson process; below: bursts; above: more even")
    add("--ramp-up-strategy", choices=STRATEGIES, help="a rate that rises over the run, instead of --request-rate")
    add("--ramp-up-start-rps", type=number(SLOWEST_PER_S, FASTEST_PER_S), metavar="PER_S")
    add("--ramp-up-end-rps", type=number(SLOWEST_PER_S, FASTEST_PER_S), metavar="PER_S")
    add("--max-concurrency", type=whole(1), help="most requests that are open at a time")
    add("--num-warmups", type=whole(), default=0, help="requests before, which do not count")
    add("--ignore-eos", action="store_true", help="answers of full length")
    add("--logprobs", type=int)
    for name in SAMPLING:
        add(f"--{name.replace('_', '-')}", type=int if name == "top_k" else float)
    add("--extra-body", type=json.loads, default={}, metavar="JSON", help="fields of every request")
    add("--request-id-prefix", default="bench-")


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("dataset").add_argument
    add("--dataset-name", default="random", choices=DATASETS)
    add("--dataset-path", help="the dataset's file")
    add("--tokenizer", help="folder or hub id; default: what --model names. Without one, prompts are token ids")
    add("--skip-tokenizer-init", action="store_true", help="prompts are token ids")
    add("--input-len", "--random-input-len", type=whole(1), default=1024, help="tokens of a random prompt")
    names = [f"--{name}output-len" for name in ("", "random-", "sharegpt-", "custom-", "prefix-repetition-")]
    add(*names, type=whole(1), help="tokens of an answer; default: the dataset's, or 128")
    add("--random-range-ratio", type=float, default=0.0, help="random lengths: uniform in length * (1 +- ratio)")
    add("--random-prefix-len", type=whole(), default=0, help="tokens that all random prompts begin with")
    add("--prefix-repetition-prefix-len", type=whole(), default=256)
    add("--prefix-repetition-suffix-len", type=whole(1), default=256)
    add("--prefix-repetition-num-prefixes", type=whole(1), default=10)
    add(
        "--trace-page-tokens",
        type=whole(1),
        default=TRACE_PAGE_TOKENS,
        help="tokens that one hash of a trace stands for",
    )
    add("--trace-max-len", type=whole(1), metavar="TOKENS", help="longest request of a trace that counts")


def _add_result(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("result").add_argument
    add("--percentile-metrics", default="ttft,tpot,itl", metavar="A,B", help=f"of {', '.join(METRICS)}")
    add("--metric-percentiles", default="99", metavar="N,N")
    add("--goodput", nargs="+", default=[], metavar="KEY:MS", help=f"objectives, of {', '.join(GOODPUT_METRICS)}")
    add("--save-result", action="store_true", help="write a JSON file")
    add("--save-detailed", action="store_true", help="with the figures of each request")
    add("--append-result", action="store_true", help="add the result to the file, as a line of its own")
    add("--result-dir", default=".")
    add("--result-filename", help="default: made of backend, rate, model and time")
    add("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the result")
    add("--label", type=readable, help="a field of the result")
    add("--disable-tqdm", action="store_true")


def _add_matters_of_course(parser: argparse.ArgumentParser) -> None:
    """Flags of vLLM's that ask, with these values, for what is the case anyway."""
    add = parser.add_argument_group("taken as they are").add_argument
    add("--trust-remote-code", action="store_true", help="no code of a checkpoint is run, so nothing has to be trusted")
    add("--tokenizer-mode", default="auto", choices=("auto", "hf"), help="tokenizers are those of tokenizer.json")
    add("--random-batch-size", type=int, default=1, choices=(1,), help="a request has one prompt")


def _check(options: argparse.Namespace) -> None:
    options.backend = "openai" if options.backend == "vllm" else options.backend
    chat = options.backend == "openai-chat"
    options.base_url = options.base_url or _url(options.host, options.port)
    options.endpoint = options.endpoint or ("/v1/chat/completions" if chat else "/v1/completions")
    options.selected = _names(options.percentile_metrics, METRICS, "percentile-metrics")
    try:
        options.percentages = [float(text) for text in options.metric_percentiles.split(",")]
        pairs = [pair.partition(":") for pair in options.goodput]
        options.objectives = {name: float(limit) for name, _, limit in pairs}
        _check_rates(options)
    except ValueError as error:
        raise ConfigError(f"a number is wrong: {error}") from None
    _names(",".join(options.objectives) or "ttft", GOODPUT_METRICS, "goodput")
    if any(not 0 < p <= 100 for p in options.percentages) or not all(
        limit >= 0 for limit in options.objectives.values()
    ):
        raise ConfigError("percentiles must be in (0, 100], objectives at least 0 ms")
    if not 0.0 <= options.random_range_ratio < 1.0:
        raise ConfigError("--random-range-ratio must be in [0, 1)")
    if not isinstance(options.extra_body, dict):
        raise ConfigError("--extra-body must be a JSON object")
    options.metadata = _pairs(options.metadata, "metadata")
    options.header = _pairs(options.header, "header")


def _url(host: str, port: int) -> str:
    try:
        return server_url(f"http://{reachable_address(host, port)}")
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--host {host}: {error}") from None


def _check_rates(options: argparse.Namespace) -> None:
    start, end = options.ramp_up_start_rps, options.ramp_up_end_rps
    if options.ramp_up_strategy is None:
        if (start, end) != (None, None):
            raise ConfigError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
        arrivals(0, options.request_rate, options.burstiness, random.Random())
        return
    if start is None or end is None:
        raise ConfigError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
    if options.request_rate < float("inf"):
        raise ConfigError("--request-rate and --ramp-up-strategy exclude each other: give one of them")
    ramp_up(0, options.ramp_up_strategy, start, end, options.burstiness, random.Random())


def _pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    if not all("=" in text for text in texts):
        raise ConfigError(f"--{flag} takes KEY=VALUE pairs")
    return dict(text.split("=", 1) for text in texts)


def _names(text: str, known: Sequence[str], flag: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--{flag}: {unknown[0]} is none of {', '.join(known)}")
    return names
