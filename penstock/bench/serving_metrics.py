"""What `penstock bench serve` says of a run: latencies, rates, goodput, under vLLM's result keys. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass
class RequestRecord:
    """One request as its client saw it; seconds. `error` is "" for a request that got a whole answer."""

    prompt_len: int
    start: float = 0.0
    ttft: float = 0.0  # to the first token
    latency: float = 0.0  # to the last token
    itl: list[float] = field(default_factory=list)  # between two messages with tokens
    output_len: int = 0
    text: str = ""
    error: str = ""
    timeline: list[dict[str, Any]] | None = None  # a Penstock's, if it was asked for

    @property
    def tpot(self) -> float:
        """Mean time of a token after the first; 0 for answers of one token."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0


def percentile(values: Sequence[float], percentage: float) -> float:
    """Linear between the two nearest values; 0 of none, as vLLM says it."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percentage / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(
    records: Sequence[RequestRecord],
    duration: float,
    percentages: Sequence[float],
    selected: Sequence[str],
    objectives: Mapping[str, float],
) -> dict[str, Any]:
    """The result's figures. Milliseconds where the key says so, else tokens, requests and seconds.

    Args:
        duration: seconds, from the first request to the last answer.
        percentages: percentiles wanted.
        selected: which of `METRICS` are given.
        objectives: milliseconds by metric; a request that keeps all of them counts for goodput.
    """
    done = [record for record in records if not record.error]
    tokens_in, tokens_out = sum(r.prompt_len for r in done), sum(r.output_len for r in done)
    good = sum(all(getattr(r, _FIELD[name]) * 1e3 <= limit for name, limit in objectives.items()) for r in done)
    peak_tokens, peak_requests = _peaks(done)
    result = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration if objectives else None,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "rtfx": 0.0,  # seconds of audio a second, in vLLM's results: there is none
    }
    values = {
        "ttft": [r.ttft for r in done],
        "tpot": [r.tpot for r in done if r.output_len > 1],
        "itl": [gap for r in done for gap in r.itl],
        "e2el": [r.latency for r in done],
    }
    for name in selected:
        seconds = values[name]
        result[f"mean_{name}_ms"] = statistics.fmean(seconds) * 1e3 if seconds else 0.0
        result[f"median_{name}_ms"] = percentile(seconds, 50) * 1e3
        result[f"std_{name}_ms"] = statistics.pstdev(seconds) * 1e3 if seconds else 0.0
        for percentage in percentages:
            result[f"p{percentage:g}_{name}_ms"] = percentile(seconds, percentage) * 1e3
    return result


_FIELD = {"ttft": "ttft", "tpot": "tpot", "e2el": "latency"}


def details(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """The figures of each request, in the order of the requests."""
    return {
        "input_lens": [r.prompt_len for r in records],
        "output_lens": [r.output_len for r in records],
        "ttfts": [r.ttft for r in records],
        "itls": [r.itl for r in records],
        "start_times": [r.start for r in records],
        "generated_texts": [r.text for r in records],
        "errors": [r.error for r in records],
    }


def _peaks(done: Sequence[RequestRecord]) -> tuple[float, int]:
    """Most messages with tokens, and most requests that were open, in one second of the run."""
    if not done:
        return 0.0, 0
    begin = min(r.start for r in done)
    tokens: Counter[int] = Counter()
    open_requests: Counter[int] = Counter()
    for record in done:
        at = record.start - begin + record.ttft
        tokens[int(at)] += 1
        for gap in record.itl:
            at += gap
            tokens[int(at)] += 1
        first, last = int(record.start - begin), int(record.start - begin + record.latency)
        open_requests.update(range(first, last + 1))
    return float(max(tokens.values())), max(open_requests.values())


def table(result: Mapping[str, Any], selected: Sequence[str], percentages: Sequence[float]) -> list[str]:
    """The result for people."""
    rows: list[tuple[str, str]] = [
        ("requests that got an answer", f"{result['completed']}"),
        ("requests that failed", f"{result['failed']}"),
        ("duration (s)", f"{result['duration']:.2f}"),
        ("prompt / output tokens", f"{result['total_input_tokens']} / {result['total_output_tokens']}"),
        ("requests / s", f"{result['request_throughput']:.2f}"),
        ("output tokens / s", f"{result['output_throughput']:.2f}"),
        ("all tokens / s", f"{result['total_token_throughput']:.2f}"),
        ("most output tokens in a second", f"{result['max_output_tokens_per_s']:.0f}"),
        ("most open requests in a second", f"{result['max_concurrent_requests']}"),
    ]
    if result["request_goodput"] is not None:
        rows.append(("goodput (requests / s)", f"{result['request_goodput']:.2f}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value:>16}" for name, value in rows]
    names = ["mean", "median", *(f"p{percentage:g}" for percentage in percentages)]
    lines += ["", f"{'ms':<8}" + "".join(f"{name:>12}" for name in names)]
    for metric in selected:
        lines.append(f"{metric:<8}" + "".join(f"{result[f'{name}_{metric}_ms']:>12.2f}" for name in names))
    return lines
