"""`penstock bench serve`: a load on an OpenAI-compatible server, and what its clients saw.

Flags and result keys are vLLM's. Options, arrivals, questions and figures are pure, in files of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from penstock.bench.arrivals import arrivals, ramp_up
from penstock.bench.client import ask, run_load
from penstock.bench.output_file import prepare, write
from penstock.bench.questions import Question, questions
from penstock.bench.serve_options import SAMPLING, parse
from penstock.bench.serving_metrics import RequestRecord, details, summarise, table
from penstock.common.errors import ConfigError
from penstock.http_client import Client, RequestError, connect


def run_serve(arguments: Sequence[str]) -> int:
    """Measure, print and write; 1 if no request got an answer.

    Raises:
        ConfigError: an option is wrong, a dataset or tokenizer cannot be read, the server is not there, or the result
            cannot be written.
    """
    options = parse(arguments)
    saves = options.save_result or options.save_detailed or options.append_result
    if saves:
        prepare(Path(options.result_dir) / (options.result_filename or "result.json"))
    records, duration = asyncio.run(_measure(options))
    for error in dict.fromkeys(record.error for record in records if record.error):
        print(f"failed: {error}", file=sys.stderr)
    result = summarise(records, duration, options.percentages, options.selected, options.objectives)
    print("\n".join(table(result, options.selected, options.percentages)))
    if saves:
        _save(options, result | (details(records) if options.save_detailed else {}))
    return 0 if result["completed"] else 1


async def _measure(options: argparse.Namespace) -> tuple[list[RequestRecord], float]:
    """(a record a request, seconds). Sets `options.model` to the name that was asked for."""
    session = connect(options.base_url, api_key=options.api_key, headers=options.header, verify=not options.insecure)
    async with session as client:
        names = await _models(client, options.ready_check_timeout_sec)
        asked, warmups = questions(options, names[0])
        options.model = options.served_model_name or options.model or names[0]
        fields: dict[str, Any] = {"model": options.model} | {
            name: value for name in (*SAMPLING, "logprobs") if (value := getattr(options, name)) is not None
        }
        fields |= ({"ignore_eos": True} if options.ignore_eos else {}) | options.extra_body

        async def send(name: str, question: Question) -> RequestRecord:
            path, request_id = options.endpoint, options.request_id_prefix + name
            return await ask(client, path, options.backend, fields, question, request_id)

        most = options.max_concurrency
        if warmups:
            await run_load(warmups, [0.0] * len(warmups), lambda i, q: send(f"warmup-{i}", q), max_concurrency=most)
        with tqdm(total=len(asked), desc="Requests", disable=True if options.disable_tqdm else None) as bar:

            async def counted(number: int, question: Question) -> RequestRecord:
                record = await send(str(number), question)
                bar.update()
                return record

            return await run_load(asked, _times(options, asked), counted, max_concurrency=most)


def _times(options: argparse.Namespace, asked: Sequence[Question]) -> list[float]:
    """When each is sent: by the options, or by its trace where they say nothing."""
    chooser = random.Random(options.seed)
    if options.ramp_up_strategy:
        rates = options.ramp_up_start_rps, options.ramp_up_end_rps
        return ramp_up(len(asked), options.ramp_up_strategy, *rates, options.burstiness, chooser)
    if options.request_rate < float("inf"):
        return arrivals(len(asked), options.request_rate, options.burstiness, chooser)
    return [question.at_s for question in asked]


async def _models(client: Client, timeout_s: float) -> list[str]:
    """What the server has; waits for it as long as it was told.

    Raises:
        ConfigError: the server is not there, or refuses.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return await client.models()
        except RequestError as error:
            if (error.status and error.status != 503) or time.monotonic() > deadline:
                raise ConfigError(f"no server at {client.base_url}: {error}") from None
        await asyncio.sleep(0.2)


def _save(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the result file."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    rate = options.request_rate
    facts = {
        "date": now,
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": options.label,
        "model_id": options.model,
        "tokenizer_id": options.tokenizer or options.model,
        "num_prompts": options.num_prompts,
        **options.metadata,
        "request_rate": rate if rate < float("inf") else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
    }
    shown_rate = f"{rate:g}qps"
    if options.ramp_up_strategy:
        names = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
        facts |= {name: getattr(options, name) for name in names}
        shown_rate = "ramp-up-{}-{:g}qps-{:g}qps".format(*(facts[name] for name in names))
    if options.max_concurrency:
        shown_rate += f"-concurrency{options.max_concurrency}"
    label = options.label or options.backend
    path = Path(options.result_dir) / (
        options.result_filename or f"{label}-{shown_rate}-{Path(options.model).name}-{now}.json"
    )
    indent = None if options.append_result else 1
    write(path, json.dumps(facts | result, indent=indent) + "\n", append=options.append_result)
