"""Requests to simulate: Mooncake's traces (JSON lines), Azure's (CSV), or generated ones. Times are milliseconds.

A request's pages are its block hashes, as small integers; a trace without them (Azure) has requests that share nothing.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from penstock.common.errors import ConfigError

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
GENERATED = "generated:"
_TENANT_PAGES = 4  # of a generated request's shared beginning
_MEAN_OWN_PAGES, _MEAN_OUTPUT = 4, 200


@dataclass(frozen=True)
class TracedRequest:
    """One request. `pages` names the pages of its prompt, from the first; () where the trace has no names."""

    arrival_ms: float
    prompt_tokens: int
    output_tokens: int
    pages: tuple[int, ...] = ()


def read_trace(source: str, page_tokens: int, seed: int = 0) -> list[TracedRequest]:
    """The requests of a trace file, or of `generated:NUMBER`, in order of arrival, from time 0.

    Raises:
        ConfigError: it cannot be read, is in no known format, or is empty.
    """
    if source.startswith(GENERATED):
        return list(generated(_count(source.removeprefix(GENERATED)), page_tokens, seed))
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: a byte order mark is no part of it
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that cannot be
        raise ConfigError(f"cannot read the trace {source}: {error}") from error
    found: list[TracedRequest] = []
    if text.lstrip().startswith("{"):
        found = _mooncake(source, text.split("\n"), page_tokens)  # splitlines() parts what JSON may hold, as U+2028
    elif text.strip():
        found = _azure(source, text.strip().split("\n"))
    if not found:
        raise ConfigError(f"{source} holds no requests")
    found.sort(key=lambda request: request.arrival_ms)
    begin_ms = found[0].arrival_ms
    return [replace(request, arrival_ms=request.arrival_ms - begin_ms) for request in found]


def generated(number: int, page_tokens: int, seed: int) -> Iterator[TracedRequest]:
    """Random requests, one a second: each begins with one of `number`/50 shared prefixes, Zipf's law saying which.

    Prompts have 4 shared pages and 4 of their own on average, outputs 200 tokens, both exponentially distributed.
    """
    chance = random.Random(seed)
    prefixes = max(1, number // 50)
    own = prefixes * _TENANT_PAGES
    now_ms = 0.0
    for _ in range(number):
        tenant = min(int(prefixes ** chance.random()), prefixes) - 1  # density 1/rank
        count = 1 + int(chance.expovariate(1 / _MEAN_OWN_PAGES))
        shared = range(tenant * _TENANT_PAGES, (tenant + 1) * _TENANT_PAGES)
        pages = (*shared, *range(own, own + count))
        own += count
        tokens = len(pages) * page_tokens - chance.randrange(page_tokens)
        yield TracedRequest(now_ms, tokens, 1 + int(chance.expovariate(1 / _MEAN_OUTPUT)), pages)
        now_ms += chance.expovariate(1e-3)


def time_scaled(requests: Iterable[TracedRequest], factor: float) -> list[TracedRequest]:
    """The same requests, `factor` times as long apart."""
    return [replace(request, arrival_ms=request.arrival_ms * factor) for request in requests]


def repeated(requests: Sequence[TracedRequest], times: int) -> list[TracedRequest]:
    """The trace `times` times, one after the other, each with pages of its own; what begins every prompt stays shared.

    A trace of one cluster is over too soon for a larger one: a worker that gets a few long prompts late has no time
    left to be spared others.
    """
    common = set(requests[0].pages)
    largest = 0
    for request in requests:
        common.intersection_update(request.pages)
        largest = max(largest, *request.pages) if request.pages else largest
    span_ms = requests[-1].arrival_ms * (1 + 1 / len(requests))
    return [
        replace(
            request,
            arrival_ms=request.arrival_ms + turn * span_ms,
            pages=tuple(page if page in common else page + turn * (largest + 1) for page in request.pages),
        )
        for turn in range(times)
        for request in requests
    ]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{GENERATED}NUMBER needs a number of requests, got {text!r}")
    return int(text)


def _mooncake(source: str, lines: list[str], page_tokens: int) -> list[TracedRequest]:
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            pages = tuple(map(int, row["hash_ids"]))
            request = TracedRequest(
                _time(row["timestamp"]), int(row["input_length"]), max(1, int(row["output_length"])), pages
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{source}, line {number}: not a request of a Mooncake trace ({error!r})") from error
        if request.prompt_tokens < 1:
            raise ConfigError(f"{source}, line {number}: a prompt of {request.prompt_tokens} tokens")
        if len(pages) != -(-request.prompt_tokens // page_tokens):
            raise ConfigError(
                f"{source}, line {number}: {request.prompt_tokens} tokens are not {len(pages)} pages "
                f"of {page_tokens}: --page-tokens must be the trace's block size"
            )
        found.append(request)
    return found


def _time(value: Any) -> float:
    time_ms = float(value)
    if not math.isfinite(time_ms):
        raise ValueError(f"timestamp {value}")
    return time_ms


def _azure(source: str, lines: list[str]) -> list[TracedRequest]:
    rows = csv.DictReader(lines)
    try:
        return _azure_rows(source, rows)
    except csv.Error as error:
        raise ConfigError(f"{source}: no Azure trace: {error}") from error


def _azure_rows(source: str, rows: csv.DictReader[str]) -> list[TracedRequest]:
    if not set(AZURE_COLUMNS) <= set(rows.fieldnames or ()):
        raise ConfigError(f"{source} is neither a Mooncake trace (JSON lines) nor has it the columns of an Azure trace")
    found = []
    for number, row in enumerate(rows, 2):
        try:
            time, prompt, output = (row[name] for name in AZURE_COLUMNS)
            # Seven digits of a second: more than Python before 3.11 reads.
            whole, _, fraction = time.partition(".")
            at_ms = datetime.fromisoformat(whole + "+00:00").timestamp() * 1e3 + float(f"0.{fraction or 0}") * 1e3
            found.append(TracedRequest(at_ms, max(1, int(prompt)), max(1, int(output))))
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{source}, line {number}: not a request of an Azure trace ({error!r})") from error
    return found
