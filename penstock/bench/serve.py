"""`penstock bench serve`: a load on an OpenAI-compatible server, and what its clients saw.

Flags and result keys are vLLM's. Arrivals, questions and figures are pure, in files of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from penstock.bench.arrivals import arrivals
from penstock.bench.questions import DATASETS, questions
from penstock.bench.serving_metrics import GOODPUT_METRICS, METRICS, RequestRecord, details, summarise, table
from penstock.common.errors import ConfigError

BACKENDS = ("openai", "openai-chat", "vllm")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
_REFUSED = {
    "--lora-modules": "LoRA adapters are not supported",
    "--profile": "the server is profiled where it runs",
    "--use-beam-search": "it is not measured",
    "--ramp-up-strategy": "the rate is constant; run several rates",
    "--plot-timeline": "ask for the timeline of a request instead (X-Penstock-Timeline), or look at /ui",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see {self.prog} --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options.

    Raises:
        ConfigError: unknown, wrong or contradicting.
    """
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in _REFUSED:
            raise ConfigError(f"vLLM's {flag} is not supported: {_REFUSED[flag]}")
    dashed = [re.sub(r"^--[^=]+", lambda match: match[0].replace("_", "-"), argument) for argument in arguments]
    parser = _Parser(prog="penstock bench serve", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--backend", "--endpoint-type", default="openai", choices=BACKENDS, help="openai: completions (also: vllm)")
    add("--base-url", help="instead of host and port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--endpoint", help="default: /v1/completions, or /v1/chat/completions")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="default: $OPENAI_API_KEY")
    add("--model", help="name to ask for; default: the first that the server has")
    add("--tokenizer", help="folder or hub id; default: what --model names. Without one, prompts are token ids")
    add("--dataset-name", default="random", choices=DATASETS)
    add("--dataset-path", help="the dataset's file")
    add("--num-prompts", type=int, default=1000)
    add("--seed", type=int, default=0)
    add("--request-rate", type=float, default=float("inf"), metavar="PER_S", help="requests a second; inf: all at once")
    add("--burstiness", type=float, default=1.0, help="1: a Poisson process; below: bursts; above: more even")
    add("--max-concurrency", type=int, help="most requests that are open at a time")
    add("--num-warmups", type=int, default=0, help="requests before, which do not count")
    add("--ready-check-timeout-sec", type=float, default=0.0, metavar="S", help="how long to wait for the server")
    add("--percentile-metrics", default="ttft,tpot,itl", metavar="A,B", help=f"of {', '.join(METRICS)}")
    add("--metric-percentiles", default="99", metavar="N,N")
    add("--goodput", nargs="+", default=[], metavar="KEY:MS", help=f"objectives, of {', '.join(GOODPUT_METRICS)}")
    add("--ignore-eos", action="store_true", help="answers of full length")
    add("--logprobs", type=int)
    for name in _SAMPLING:
        add(f"--{name.replace('_', '-')}", type=int if name == "top_k" else float)
    add("--extra-body", type=json.loads, default={}, metavar="JSON", help="fields of every request")
    add("--request-id-prefix", default="bench-")
    add("--input-len", "--random-input-len", type=int, default=1024, help="tokens of a random prompt")
    add("--output-len", "--random-output-len", type=int, help="tokens of an answer; default: the dataset's, or 128")
    add("--random-range-ratio", type=float, default=0.0, help="random lengths: uniform in length * (1 +- ratio)")
    add("--random-prefix-len", type=int, default=0, help="tokens that all random prompts begin with")
    add("--prefix-repetition-prefix-len", type=int, default=256)
    add("--prefix-repetition-suffix-len", type=int, default=256)
    add("--prefix-repetition-num-prefixes", type=int, default=10)
    add("--prefix-repetition-output-len", type=int, default=128)
    add("--save-result", action="store_true", help="write a JSON file")
    add("--save-detailed", action="store_true", help="with the figures of each request")
    add("--result-dir", default=".")
    add("--result-filename", help="default: made of backend, rate, model and time")
    add("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="fields of the result")
    add("--label", help="a field of the result")
    add("--disable-tqdm", action="store_true")
    options = parser.parse_args(dashed)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    options.backend = "openai" if options.backend == "vllm" else options.backend
    chat = options.backend == "openai-chat"
    options.base_url = (options.base_url or f"http://{options.host}:{options.port}").rstrip("/")
    options.endpoint = options.endpoint or ("/v1/chat/completions" if chat else "/v1/completions")
    options.selected = _names(options.percentile_metrics, METRICS, "percentile-metrics")
    try:
        options.percentages = [float(text) for text in options.metric_percentiles.split(",")]
        pairs = [pair.partition(":") for pair in options.goodput]
        options.objectives = {name: float(limit) for name, _, limit in pairs}
        arrivals(0, options.request_rate, options.burstiness, random.Random())
    except ValueError as error:
        raise ConfigError(f"a number is wrong: {error}") from None
    _names(",".join(options.objectives) or "ttft", GOODPUT_METRICS, "goodput")
    if any(not 0 < p <= 100 for p in options.percentages) or any(limit < 0 for limit in options.objectives.values()):
        raise ConfigError("percentiles must be in (0, 100], objectives at least 0 ms")
    if urlsplit(options.base_url).scheme not in ("http", "https"):
        raise ConfigError(f"--base-url {options.base_url}: give http:// or https://")
    for name in ("num_prompts", "input_len", "output_len", "max_concurrency"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    if not isinstance(options.extra_body, dict):
        raise ConfigError("--extra-body must be a JSON object")
    if not all("=" in pair for pair in options.metadata):
        raise ConfigError("--metadata takes KEY=VALUE pairs")


def _names(text: str, known: Sequence[str], flag: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--{flag}: {unknown[0]} is none of {', '.join(known)}")
    return names


def run_serve(arguments: Sequence[str]) -> int:
    """Measure, print and write; 1 if no request got an answer.

    Raises:
        ConfigError: an option is wrong, a dataset or tokenizer cannot be read, the server is not there.
    """
    options = parse(arguments)
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ConfigError("bench serve needs aiohttp: pip install 'penstock[bench]'") from None
    result = asyncio.run(_measure(options))
    print("\n".join(table(result, options.selected, options.percentages)))
    _save(options, result)
    return 0 if result["completed"] else 1


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import aiohttp
    from tqdm import tqdm

    from penstock.bench.client import Question, ask

    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    connector = aiohttp.TCPConnector(limit=0, force_close=False)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        model = await _model(session, options)
        asked, warmups = questions(options, model)
        fields: dict[str, Any] = {"model": model} | {
            name: value for name in (*_SAMPLING, "logprobs") if (value := getattr(options, name)) is not None
        }
        fields |= ({"ignore_eos": True} if options.ignore_eos else {}) | options.extra_body
        url = options.base_url + options.endpoint
        limit = asyncio.Semaphore(options.max_concurrency or len(asked) + len(warmups) + 1)
        bar = tqdm(total=len(asked), desc="Requests", disable=True if options.disable_tqdm else None)

        async def one(number: str, question: Question) -> RequestRecord:
            async with limit:
                record = await ask(session, url, options.backend, fields, question, options.request_id_prefix + number)
            bar.update()
            return record

        if warmups:
            await asyncio.gather(*(one(f"warmup-{i}", question) for i, question in enumerate(warmups)))
            bar.reset()
        times = arrivals(len(asked), options.request_rate, options.burstiness, random.Random(options.seed))
        begun = time.perf_counter()
        tasks = []
        for number, (at, question) in enumerate(zip(times, asked, strict=True)):
            if (wait := begun + at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(str(number), question)))
        records = await asyncio.gather(*tasks)
        duration = time.perf_counter() - begun
        bar.close()
    for error in dict.fromkeys(record.error for record in records if record.error):
        print(f"failed: {error}", file=sys.stderr)
    options.model = model
    options.records = records
    return summarise(records, duration, options.percentages, options.selected, options.objectives)


async def _model(session: Any, options: argparse.Namespace) -> str:
    """The name to ask for; waits for the server as long as it was told.

    Raises:
        ConfigError: the server is not there, or has no model.
    """
    import aiohttp

    deadline = time.monotonic() + options.ready_check_timeout_sec
    while True:
        try:
            async with session.get(f"{options.base_url}/v1/models") as response:
                if response.status != 200:
                    raise ConfigError(f"{options.base_url}/v1/models answers {response.status}")
                names = [card["id"] for card in (await response.json())["data"]]
                return str(options.model or names[0])
        except (aiohttp.ClientError, OSError) as error:
            if time.monotonic() > deadline:
                raise ConfigError(f"no server at {options.base_url}: {error}") from None
        except (KeyError, IndexError, TypeError, ValueError):
            raise ConfigError(f"{options.base_url}/v1/models names no model") from None
        await asyncio.sleep(0.2)


def _save(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the result file, if one is wanted."""
    if not (options.save_result or options.save_detailed):
        return
    rate = options.request_rate
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    facts = {
        "date": now,
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": options.label,
        "model_id": options.model,
        "tokenizer_id": options.tokenizer or options.model,
        "num_prompts": options.num_prompts,
        **dict(pair.split("=", 1) for pair in options.metadata),
        "request_rate": rate if rate < float("inf") else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
    }
    whole = facts | result | (details(options.records) if options.save_detailed else {})
    shown_rate = f"{rate:g}qps"
    name = options.result_filename or f"{options.backend}-{shown_rate}-{Path(options.model).name}-{now}.json"
    path = Path(options.result_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"Result: {path}")
