"""Draining a busy decode worker: what its streams notice, and what is computed again.

    python benchmarks/drain.py --streams 16

Two decode workers serve streams of the demo model; in the middle of them one is drained. For every stream that moved:
the longest gap between two tokens, less what reading its pages took (the span `fetch` of its timeline), and how many
tokens the other worker computed again. Tokens are compared with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks import record
from penstock.common.config import ServeConfig
from penstock.demo_model import CHECKPOINT
from penstock.drain import drain
from penstock.fleet import Fleet
from penstock.http_client import Client, connect

HEADERS = {"X-Penstock-Timeline": "1"}
PAGE = 16


@dataclass(frozen=True)
class Stream:
    """One answer as its client saw it. Gaps in milliseconds; `fetch_ms` is None where nothing had to be read."""

    token_ids: list[int]
    longest_gap_ms: float
    median_gap_ms: float
    fetch_ms: float | None  # of its pages, by the worker it moved to
    moved: bool
    recomputed_tokens: int  # by the worker it moved to; the last known token nobody had computed before


async def _stream(client: Client, prompt: list[int], tokens: int) -> Stream:
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True}
    body |= {"min_tokens": tokens, "return_token_ids": True}  # no token is the end, which has no text and no event
    token_ids: list[int] = []
    gaps, last = [], 0.0
    timeline: list[dict[str, Any]] = []
    async for event in client.stream("/v1/completions", body):
        now = time.perf_counter()
        timeline = event.get("timeline") or timeline
        if event.get("choices") and event["choices"][0].get("token_ids"):
            token_ids += event["choices"][0]["token_ids"]
            if last:
                gaps.append((now - last) * 1e3)
            last = now
    attempts = [number for number, entry in enumerate(timeline) if entry["name"] == "prefill"]
    again = timeline[attempts[0] + 1 :] if attempts else []  # of the worker that it moved to
    fetched = next((entry for entry in again if entry["name"] == "fetch"), None)
    computed = sum(entry["computed_tokens"] for entry in again if entry["name"] == "prefill")
    moved = fetched is not None or any(entry["name"] == "queue" for entry in again)
    recomputed = max(0, computed - 1)
    if len(token_ids) != tokens:
        raise SystemExit(f"{len(token_ids)} tokens came instead of {tokens}")
    return Stream(token_ids, max(gaps), statistics.median(gaps), fetched["ms"] if fetched else None, moved, recomputed)


async def _run(fleet: Fleet, prompts: list[list[int]], tokens: int, leaving: str, after_s: float) -> list[Stream]:
    worker = fleet.workers()[leaving] if leaving else None  # before: it would hold up who reads the streams
    async with connect(fleet.url, headers=HEADERS) as client:
        streams = [asyncio.create_task(_stream(client, prompt, tokens)) for prompt in prompts]
        if worker is not None:
            await asyncio.sleep(after_s)
            if not await asyncio.to_thread(drain, worker.address, worker.incarnation, "", 60.0):
                raise SystemExit(f"{leaving} did not leave")
        return await asyncio.gather(*streams)


def measure(streams: int, tokens: int, prompt_tokens: int) -> dict[str, Any]:
    """Figures of one drain."""
    chooser = random.Random(2)
    config = ServeConfig(
        model=str(CHECKPOINT), decode_workers=2, dtype="float32", block_size=PAGE, port=0, served_model_name=("demo",)
    )
    with Fleet(config) as fleet:
        vocabulary = next(iter(fleet.workers().values())).vocab_size
        prompts = [[chooser.randrange(3, vocabulary) for _ in range(prompt_tokens)] for _ in range(streams)]
        asyncio.run(_run(fleet, prompts, 8, "", 0.0))  # links, rates, kernels
        started = time.perf_counter()
        calm = asyncio.run(_run(fleet, prompts, tokens, "", 0.0))
        half_s = (time.perf_counter() - started) / 2
        drained = asyncio.run(_run(fleet, prompts, tokens, "decode-0", half_s))
    moved = [stream for stream in drained if stream.moved]
    if not moved:
        raise SystemExit("no stream moved: they ended before; ask for more tokens")
    beyond = [stream.longest_gap_ms - (stream.fetch_ms or 0.0) for stream in moved]
    return {
        "streams": streams,
        "moved": len(moved),
        "exact": sum(a.token_ids == b.token_ids for a, b in zip(calm, drained, strict=True)),
        "longest_gap_ms": max(stream.longest_gap_ms for stream in moved),
        "longest_gap_beyond_fetch_ms": max(beyond),
        "median_gap_ms": statistics.median(stream.median_gap_ms for stream in moved),
        "longest_gap_undisturbed_ms": max(stream.longest_gap_ms for stream in calm),
        "most_recomputed_tokens": max(stream.recomputed_tokens for stream in moved),
        "page_tokens": PAGE,
        "rows": [{name: value for name, value in asdict(stream).items() if name != "token_ids"} for stream in drained],
    }


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/drain-COMMIT.json")
    options = parser.parse_args()
    figures = measure(options.streams, options.tokens, options.prompt_tokens)
    for name, value in figures.items():
        if name != "rows":
            print(f"{name}: {value if isinstance(value, int) else round(value, 1)}")
    at = record.commit()
    output = options.output or record.RESULTS / record.file_name("drain", at)
    record.merge(output, record.machine(), at, figures)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
