"""What the router costs: streamed requests per second of its CPU time, and the latency it adds, over instant workers.

    python benchmarks/router_overhead.py [--requests 2000] [--streams 64] [--step-ms 10] [--router-procs 1 2 4]
        [--only KEY ...] [--out FILE]

Redis, the router as `penstock router` starts it, workers that speak the bus protocol but compute nothing (one token of
every running request a step), and the load generator (router_load.py); only the router's CPU time
is counted. About five minutes. Each key of the result is a method of `Bench`; those with long prompts have two workers,
so that the router hashes what it has tokenised and looks it up.
Writes benchmarks/results/router_overhead-<commit>.json; where --only names some of the keys, nothing but --out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks.record import RESULTS, commit, file_name, machine
from benchmarks.router_load import (
    MODEL,
    ROOT,
    TOKENS,
    Running,
    arrive,
    asked,
    clients_apart,
    cpu_seconds,
    drive,
    fleet,
    http_request,
    memory_mib,
)
from penstock.common.tokenizer import Tokenizer

TEXT = ROOT / "scripts" / "demo_corpus" / "mill.txt"
SHORT, LONG, LONGEST = 100, 8_000, 100_000  # tokens of a prompt
HELD, HELD_STEP_MS, RAMP_S = 5_000, 1000.0, 25.0  # a stream of so many tokens is open for 64 s


class Bench:
    """The prompts, and the measurements by the result's keys."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = Tokenizer.load(str(MODEL))
        ids = self.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
        ids *= LONGEST // len(ids) + 1
        self.prompts = {n: self.tokenizer.decode(ids[:n]) for n in (SHORT, LONG, LONGEST)}
        self.per_cpu_s = 0.0  # requests, as `paced` has measured

    def request(self, running: Running, tokens: int = SHORT) -> bytes:
        """A streamed completion as bytes."""
        return http_request(running.port, self.prompts[tokens])

    # ------------------------------------------------------------ keys of the result

    def paced(self) -> dict[str, Any]:
        """Tokens come one by one, as from a real worker: what a CPU-second of the router's is good for."""
        found = self._throughput(self.options.step_ms, 1)
        self.per_cpu_s = found["requests_per_router_cpu_s"]
        return found

    def paced_two_workers(self) -> dict[str, Any]:
        """The same with a choice of workers: a look-up in Redis a request."""
        return self._throughput(self.options.step_ms, 2)

    def instant(self) -> dict[str, Any]:
        """Steps as fast as they go: many tokens of a stream arrive together."""
        return self._throughput(0.0, 1)

    def prompt_costs(self) -> dict[str, Any]:
        """CPU time of a whole request by the prompt's length; the tokenizer's part is measured in this process."""
        return {str(tokens): self._prompt_cost(tokens) for tokens in (SHORT, LONG, LONGEST)}

    def latency_alone(self) -> dict[str, Any]:
        """What one client alone sees: all of it is added by the router and the bus."""
        found: dict[str, Any] = {}
        with fleet(0.0) as running:
            for tokens, requests in ((SHORT, 300), (LONG, 150)):
                request = self.request(running, tokens)
                uvloop.run(drive(running.port, request, 1, 20))
                times = uvloop.run(drive(running.port, request, 1, requests))
                first, last = zip(*times, strict=True)
                found[str(tokens)] = {"first_event": percentiles(first), "last_event": percentiles(last)}
        return found

    def latency_half_load(self) -> dict[str, Any]:
        """Requests at random, half as many a second as a CPU-second is good for; the first token comes at once."""
        per_cpu_s = self.per_cpu_s or self.paced()["requests_per_router_cpu_s"]
        rate, seconds = per_cpu_s / 2, 15.0
        with fleet(self.options.step_ms, first_at_once=True) as running:
            request = self.request(running)
            uvloop.run(arrive(running.port, request, rate, 3.0))
            before, start = cpu_seconds(running.pid), time.perf_counter()
            times = uvloop.run(arrive(running.port, request, rate, seconds))
            busy = (cpu_seconds(running.pid) - before) / (time.perf_counter() - start)
        first = percentiles([first for first, _ in times])
        return {"requests_per_s": round(rate), "router_busy": round(busy, 2), "first_event": first}

    def open_streams(self) -> dict[str, Any]:
        """Thousands at a time: all are answered in full, what they take, and how long the event loop is held up."""
        with fleet(HELD_STEP_MS, first_at_once=True, watched=True) as running:
            before, empty_mib, since = cpu_seconds(running.pid), memory_mib(running.pid), time.time()
            most, most_mib, times, until = uvloop.run(self._hold(running))
            return {
                "streams": HELD,
                "step_ms": HELD_STEP_MS,
                "answered": len(times),
                "open_at_once": most,
                "router_mib_per_1000": round((most_mib - empty_mib) / HELD * 1e3, 1),
                "router_cpu_s": round(cpu_seconds(running.pid) - before, 2),
                "whole_answer": percentiles([last for _, last in times]),
                "event_loop": running.stalls(since, until),
            }

    def stalls(self) -> dict[str, Any]:
        """How long the event loop is held up while short streams run: by themselves, and beside the longest prompts."""
        found = {}
        with fleet(self.options.step_ms, workers=2, watched=True) as running:
            for name, prompts in (("short_prompts", 0), (f"beside_{LONGEST}_tokens", 12)):
                since = time.time()
                uvloop.run(self._beside(running, prompts))
                found[name] = running.stalls(since, time.time())
        return found

    def router_procs(self) -> dict[str, Any]:
        """Requests a second on the clock with several router processes, each with a worker and a client process more.

        Only a machine with four cores for each shows what they can do.
        """
        return {str(procs): self._wall_rate(procs) for procs in self.options.router_procs}

    # ------------------------------------------------------------ how

    def _throughput(self, step_ms: float, workers: int) -> dict[str, Any]:
        streams, requests = self.options.streams, self.options.requests
        with fleet(step_ms, workers=workers) as running:
            request = self.request(running)
            uvloop.run(drive(running.port, request, streams, max(streams, requests // 10)))
            before, start = cpu_seconds(running.pid), time.perf_counter()
            times = uvloop.run(drive(running.port, request, streams, requests))
            cpu_s, wall_s = cpu_seconds(running.pid) - before, time.perf_counter() - start
        return {
            "step_ms": step_ms,
            "streams": streams,
            "requests": requests,
            "router_cpu_s": round(cpu_s, 2),
            "wall_s": round(wall_s, 2),
            "requests_per_router_cpu_s": round(requests / cpu_s, 1),
            "router_cpu_us_per_token": round(cpu_s / requests / TOKENS * 1e6, 1),
            "first_event": percentiles([first for first, _ in times]),
        }

    def _prompt_cost(self, tokens: int) -> dict[str, float]:
        requests, streams = {SHORT: (1000, 64), LONG: (200, 16), LONGEST: (24, 4)}[tokens]
        with fleet(self.options.step_ms, workers=2) as running:
            request = self.request(running, tokens)
            uvloop.run(drive(running.port, request, streams, 2 * streams))
            before = cpu_seconds(running.pid)
            uvloop.run(drive(running.port, request, streams, requests))
            whole_ms = (cpu_seconds(running.pid) - before) / requests * 1e3
        alone_ms = min(self._tokenising_ms(tokens) for _ in range(5))
        return {
            "router_cpu_ms": round(whole_ms, 2),
            "tokenising_ms": round(alone_ms, 2),
            "rest_ms": round(whole_ms - alone_ms, 2),
        }

    def _tokenising_ms(self, tokens: int) -> float:
        before = time.process_time()
        self.tokenizer.encode(self.prompts[tokens])
        return (time.process_time() - before) * 1e3

    async def _hold(self, running: Running) -> tuple[int, float, list[tuple[float, float]], float]:
        """(most streams, most memory, times, when the last was answered: thousands that hang up at once come after)."""
        until: list[float] = []
        request = self.request(running)
        load = drive(running.port, request, HELD, HELD, RAMP_S, lambda: until.append(time.time()))
        streams = asyncio.ensure_future(load)
        most, most_mib = 0, 0.0
        while not streams.done():
            await asyncio.wait({streams}, timeout=1.0)
            most = max(most, (await asyncio.to_thread(asked, running.port, "/load"))["server_load"])
            most_mib = max(most_mib, memory_mib(running.pid))
        return most, most_mib, streams.result(), until[0]

    async def _beside(self, running: Running, prompts: int) -> None:
        """Short streams for some seconds, and as long as prompts are left."""
        long = asyncio.ensure_future(drive(running.port, self.request(running, LONGEST), 2, prompts))
        until = time.monotonic() + 5.0
        while not long.done() or time.monotonic() < until:
            await arrive(running.port, self.request(running), 50.0, 1.0)
        await long

    def _wall_rate(self, procs: int) -> dict[str, Any]:
        streams, requests = 400, max(1, self.options.requests // 400) * 400
        with (
            fleet(self.options.step_ms, workers=procs, procs=procs) as running,
            tempfile.TemporaryDirectory() as folder,
        ):
            request = Path(folder) / "request"
            request.write_bytes(self.request(running))
            clients_apart(running.port, request, streams, streams, procs)
            before = cpu_seconds(running.pid)
            wall_s = clients_apart(running.port, request, streams, requests, procs)
            cpu_s = cpu_seconds(running.pid) - before
        return {"requests_per_s": round(procs * requests / wall_s, 1), "router_cores_used": round(cpu_s / wall_s, 2)}


MEASURES: tuple[Callable[[Bench], dict[str, Any]], ...] = (
    Bench.paced, Bench.paced_two_workers, Bench.instant, Bench.prompt_costs, Bench.latency_alone,
    Bench.latency_half_load, Bench.open_streams, Bench.stalls, Bench.router_procs,
)  # fmt: skip


def percentiles(seconds: Any) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_ms": round(cuts[49] * 1e3, 3), "p99_ms": round(cuts[98] * 1e3, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument(
        "--router-procs", type=int, nargs="+", help="default: 1, 2, 4, ... one for four cores, at least 2"
    )
    parser.add_argument("--only", nargs="+", choices=[measure.__name__ for measure in MEASURES], metavar="KEY")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/, with --only nowhere")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    options.router_procs = options.router_procs or [1, 2, *(n for n in (4, 8, 16) if 4 * n <= cores)]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the router's as well: each stream has a socket
    bench = Bench(options)
    at_commit, load_before = commit(), os.getloadavg()
    found = {}
    for measure in MEASURES:
        if options.only is None or measure.__name__ in options.only:
            found[measure.__name__] = measure(bench)
            print(measure.__name__, json.dumps(found[measure.__name__]), flush=True)
    result = {
        "commit": at_commit,
        "machine": machine(),
        "load": [load_before, os.getloadavg()],
        "tokens": TOKENS,
        **found,
    }
    if options.out is None and options.only is None:
        options.out = RESULTS / file_name("router_overhead", at_commit)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
