"""What the router costs: streamed requests per second of its CPU time, and the latency it adds, over instant workers.

    python benchmarks/router_overhead.py [--requests 2000] [--streams 64] [--step-ms 10]

Four processes: Redis, the router as `penstock router` starts it, one worker that speaks the bus protocol but computes
nothing (one token of every running request a step, all in one message), and this one, the load generator (its CPU is
not counted). `paced`: a step every --step-ms, so that tokens come one by one as from a real worker. `instant`: steps as
fast as they go. Latencies are of one client alone: request sent until the first event, and until the last.
Writes benchmarks/results/router_overhead-<commit>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import uvloop
import zmq

from penstock.common.bus import BusServer
from penstock.common.messages import (
    Abort,
    Finish,
    GenerateRequest,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Spans,
    Submit,
    TokenBatch,
    TokenDelta,
    WorkerInfo,
    WorkerLoad,
)
from penstock.common.peers import Peers
from penstock.common.redis_state import RegistryWriter
from penstock.common.tokenizer import Tokenizer
from penstock.private_redis import find_redis_server

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "penstock" / "demo_model" / "checkpoint"
TEXT = ROOT / "scripts" / "demo_corpus" / "mill.txt"
TOKENS = 64
CONTEXT = 16384
SPANS = Spans(queue_ms=0.1, prefill_ms=1.0, decode_ms=1.0)


# ---------------------------------------------------------------- the worker that computes nothing


class InstantWorker:
    """Answers every request with `TOKENS` tokens, one a step."""

    def __init__(self, redis_url: str, vocab_size: int, step_s: float) -> None:
        self._server = BusServer("127.0.0.1", 0, "")
        info = WorkerInfo(
            worker_id="instant-0", incarnation=f"instant-{os.getpid()}", role="decode", address=self._server.address,
            fingerprint="instant", model="instant", served_models=["bench"], page_size=16, num_pages=1 << 20,
            page_bytes=1, max_model_len=CONTEXT, max_num_seqs=4096, vocab_size=vocab_size, eos_token_ids=[],
        )  # fmt: skip
        self._peers = Peers(info, info.lease_s)
        self._registry = RegistryWriter(redis_url, "penstock", info)
        self._step_s = step_s
        self._running: dict[tuple[str, int], tuple[bytes, GenerateRequest, int]] = {}
        self._words = range(400, 400 + TOKENS)  # whole words of the demo tokenizer: each is an event

    def run(self) -> None:
        """Until killed."""
        next_step = time.monotonic()
        while True:
            wait_s = max(next_step - time.monotonic(), 0.0) if self._running else 0.2
            self._server.socket.poll(math.ceil(wait_s * 1e3), zmq.POLLIN)
            for identity, message in self._server.receive():
                self._take(identity, message)
            if self._running and time.monotonic() >= next_step:
                next_step = max(next_step + self._step_s, time.monotonic())
                self._step()

    def _take(self, identity: bytes, message: Any) -> None:
        if isinstance(message, Hello):
            self._server.send(identity, self._peers.hello(identity, message, time.monotonic())[0])
        elif isinstance(message, Heartbeat):
            self._peers.heartbeat(identity, message.seq, time.monotonic())
            self._server.send(identity, HeartbeatAck(seq=message.seq, load=WorkerLoad(running=len(self._running))))
        elif isinstance(message, Submit):
            request = message.request
            self._running[request.request_id, request.attempt] = (identity, request, 0)
        elif isinstance(message, Abort):
            self._running.pop((message.request_id, message.attempt), None)

    def _step(self) -> None:
        batches: dict[bytes, list[TokenDelta]] = {}
        for key, (identity, request, index) in list(self._running.items()):
            last = index == TOKENS - 1
            finish, spans = (Finish(reason="length"), SPANS) if last else (None, None)
            token = [self._words[index]]
            delta = TokenDelta(*key, request.choice, index, token, finish, None, spans)
            batches.setdefault(identity, []).append(delta)
            if last:
                del self._running[key]
            else:
                self._running[key] = (identity, request, index + 1)
        for identity, deltas in batches.items():
            self._server.send(identity, TokenBatch(deltas=deltas))


# ---------------------------------------------------------------- the load


class Client(asyncio.Protocol):
    """One keep-alive connection; sends a request and notes when its first and last event came. As cheap as can be."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.first_at = 0.0
        self.events = 0
        self._tail = b""
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self.first_at:
            self.first_at = time.perf_counter()
            if not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"not a 200: {data.decode(errors='replace')}")
        self.events += data.count(b"data: ")
        self._tail = (self._tail + data)[-7:]
        if self._tail.endswith(b"\r\n0\r\n\r\n") and self._done is not None:
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionError("the router closed the connection"))

    async def ask(self, request: bytes) -> tuple[float, float]:
        """(seconds until the first event, until the last)."""
        self.first_at, self.events, self._tail = 0.0, 0, b""
        self._done = asyncio.get_running_loop().create_future()
        assert self.transport is not None
        start = time.perf_counter()
        self.transport.write(request)
        await self._done
        end = time.perf_counter()
        if self.events != TOKENS + 1:  # one each, and [DONE]
            raise SystemExit(f"{self.events} events in a stream of {TOKENS} tokens")
        return self.first_at - start, end - start


def http_request(port: int, prompt: str) -> bytes:
    """A streamed completion as bytes."""
    fields = {"model": "bench", "prompt": prompt, "max_tokens": TOKENS, "stream": True, "temperature": 0.0}
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def drive(port: int, request: bytes, streams: int, requests: int) -> list[tuple[float, float]]:
    """`requests` requests over `streams` connections, each with one at a time."""
    loop = asyncio.get_running_loop()
    left = iter(range(requests))
    times: list[tuple[float, float]] = []

    async def one_client() -> None:
        _, client = await loop.create_connection(Client, "127.0.0.1", port)
        for _ in left:
            times.append(await client.ask(request))
        assert client.transport is not None
        client.transport.close()

    await asyncio.gather(*(one_client() for _ in range(streams)))
    return times


# ---------------------------------------------------------------- processes


@contextlib.contextmanager
def process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is gone at the end."""
    child = subprocess.Popen(command, **options)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(port: int) -> None:
    """Until /health says 200."""
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, from /proc/<pid>/stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def fleet(step_ms: float) -> Iterator[tuple[int, int]]:
    """(port, pid) of a router with one instant worker behind it."""
    redis_port, port = free_port(), free_port()
    url = f"redis://127.0.0.1:{redis_port}/0"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet = {"stdout": subprocess.DEVNULL, "env": environment}
    with tempfile.TemporaryDirectory() as folder:
        redis = [find_redis_server(), "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        router = [sys.executable, "-m", "penstock", "router", str(MODEL), "--redis-url", url, "--port", str(port)]
        router += ["--served-model-name", "bench", "--log-level", "warning"]
        worker = [sys.executable, __file__, "--worker", url, "--step-ms", str(step_ms)]
        with process(redis, **quiet), process(worker, **quiet), process(router, **quiet) as child:
            wait_ready(port)
            yield port, child.pid


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_ms": round(cuts[49] * 1e3, 3), "p99_ms": round(cuts[98] * 1e3, 3)}


def measure_throughput(step_ms: float, prompt: str, streams: int, requests: int) -> dict[str, Any]:
    """Requests per second of the router's CPU time."""
    with fleet(step_ms) as (port, pid):
        request = http_request(port, prompt)
        uvloop.run(drive(port, request, streams, max(streams, requests // 10)))  # warm-up
        before, start = cpu_seconds(pid), time.perf_counter()
        times = uvloop.run(drive(port, request, streams, requests))
        cpu_s, wall_s = cpu_seconds(pid) - before, time.perf_counter() - start
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


def measure_latency(prompt: str, requests: int) -> dict[str, Any]:
    """What one client alone sees over an instant worker: all of it is added by the router and the bus."""
    with fleet(0.0) as (port, _):
        request = http_request(port, prompt)
        uvloop.run(drive(port, request, 1, 20))
        times = uvloop.run(drive(port, request, 1, requests))
    first, whole = [first for first, _ in times], [last for _, last in times]
    return {"requests": requests, "first_event": percentiles(first), "last_event": percentiles(whole)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--worker", metavar="REDIS_URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokenizer = Tokenizer.load(str(MODEL))
    if options.worker:
        InstantWorker(options.worker, tokenizer.vocab_size, options.step_ms / 1e3).run()
        return
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    ids = ids * (8000 // len(ids) + 1)
    short, long = tokenizer.decode(ids[:100]), tokenizer.decode(ids[:8000])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "commit": commit.strip(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "tokens_per_stream": TOKENS,
        "prompt_tokens": {name: len(tokenizer.encode(text)) for name, text in (("short", short), ("long", long))},
        "paced": measure_throughput(options.step_ms, short, options.streams, options.requests),
        "instant": measure_throughput(0.0, short, options.streams, options.requests),
        "paced_long_prompt": measure_throughput(options.step_ms, long, options.streams, options.requests // 4),
        "latency_short_prompt": measure_latency(short, 300),
        "latency_long_prompt": measure_latency(long, 150),
        "load_after": os.getloadavg(),
    }
    text = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    path = ROOT / "benchmarks" / "results" / f"router_overhead-{result['commit']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
