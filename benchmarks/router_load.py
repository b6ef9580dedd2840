"""What the router's benchmark is made of: a worker that computes nothing, clients that cost little, and the processes.

`fleet` starts Redis, workers and the router as `penstock router` starts it, all gone at the end. Run as a program this
file is one of these processes: see `main`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from penstock.common.bus import BusServer
from penstock.common.messages import (
    Abort,
    Finish,
    GenerateRequest,
    Heartbeat,
    HeartbeatAck,
    Hello,
    MeasuredRates,
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
from penstock.engine.replies import Replies
from penstock.private_redis import find_redis_server

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "penstock" / "demo_model" / "checkpoint"
TOKENS = 64
CONTEXT = 1 << 17
SPANS = Spans(queue_ms=0.1, prefill_ms=1.0, decode_ms=1.0)
TIMER_S, WINDOW_S = 0.001, 0.1  # of `watch_loop`
Times = tuple[float, float]  # seconds until the first event, until the last


# ---------------------------------------------------------------- the worker that computes nothing


class InstantWorker:
    """Answers every request with `TOKENS` tokens, one a step; with `first_at_once` the first one before any step."""

    def __init__(self, redis_url: str, vocab_size: int, step_s: float, number: int, first_at_once: bool) -> None:
        self._server = BusServer("127.0.0.1", 0, "")
        self._replies = Replies(self._server.send)
        info = WorkerInfo(
            worker_id=f"instant-{number}", incarnation=f"instant-{os.getpid()}", role="decode",
            address=self._server.address, fingerprint="instant", model="instant", served_models=["bench"],
            page_size=16, num_pages=1 << 21, page_bytes=1, max_model_len=CONTEXT, max_num_seqs=8192,
            vocab_size=vocab_size, eos_token_ids=[],
        )  # fmt: skip
        self._peers = Peers(info, info.lease_s)
        self._registry = RegistryWriter(redis_url, "penstock", info)
        self._step_s, self._first_at_once = step_s, first_at_once
        self._rates = MeasuredRates(prefill_tokens_per_s=1e9, decode_step_ms=max(step_s * 1e3, 0.01))
        self._steps = 1
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
            self._peers.heartbeat(identity, time.monotonic())
            load = WorkerLoad(running=len(self._running), steps=self._steps, rates=self._rates)
            self._server.send(identity, HeartbeatAck(seq=message.seq, load=load))
        elif isinstance(message, Submit):
            request = message.request
            key = request.request_id, request.attempt
            self._running[key] = (identity, request, 0)
            if self._first_at_once:
                self._server.send(identity, TokenBatch(deltas=[self._next(key)]))
        elif isinstance(message, Abort):
            self._running.pop((message.request_id, message.attempt), None)

    def _step(self) -> None:
        self._steps += 1
        for key, (identity, _, _) in list(self._running.items()):
            self._replies.add(identity, self._next(key))
        self._replies.flush()

    def _next(self, key: tuple[str, int]) -> TokenDelta:
        identity, request, index = self._running[key]
        last = index == TOKENS - 1
        finish, spans = (Finish(reason="length"), SPANS) if last else (None, None)
        if last:
            del self._running[key]
        else:
            self._running[key] = (identity, request, index + 1)
        return TokenDelta(*key, request.choice, index, [self._words[index]], finish, None, spans)


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

    async def ask(self, request: bytes) -> Times:
        """Send it and wait for the whole answer."""
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


async def connect(port: int) -> Client:
    """A new connection."""
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return client


async def drive(
    port: int,
    request: bytes,
    streams: int,
    requests: int,
    ramp_s: float = 0.0,
    answered: Callable[[], None] = lambda: None,
) -> list[Times]:
    """`requests` requests over `streams` connections, each with one at a time; all have begun after `ramp_s`.

    `answered` is called before the connections are closed.
    """
    left = iter(range(requests))
    times: list[Times] = []
    clients = [await connect(port) for _ in range(streams)]

    async def one_after_the_other(number: int, client: Client) -> None:
        await asyncio.sleep(ramp_s * number / streams)
        for _ in left:
            times.append(await client.ask(request))

    await asyncio.gather(*(one_after_the_other(number, client) for number, client in enumerate(clients)))
    answered()
    close(clients)
    return times


async def arrive(port: int, request: bytes, rate: float, seconds: float) -> list[Times]:
    """Requests that come at random, so many a second, whether those before them have ended or not."""
    chance, loop = random.Random(1), asyncio.get_running_loop()
    clients: list[Client] = []
    idle: list[Client] = []
    times: list[Times] = []

    async def one() -> None:
        if not idle:
            idle.append(await connect(port))
            clients.append(idle[-1])
        client = idle.pop()
        times.append(await client.ask(request))
        idle.append(client)

    at = start = loop.time()
    running = []
    while at < start + seconds:
        at += chance.expovariate(rate)
        await asyncio.sleep(at - loop.time())
        running.append(asyncio.ensure_future(one()))
    await asyncio.gather(*running)
    close(clients)
    return times


def close(clients: list[Client]) -> None:
    """Hang up."""
    for client in clients:
        assert client.transport is not None
        client.transport.close()


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


def wait_ready(port: int, workers: int, procs: int) -> None:
    """Until all router processes answer and are linked to all workers, and those have told how fast they are."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(urllib.error.URLError, OSError):
            fleet = asked(port, "/fleet")
            told = sum(worker["totals"]["steps"] > 0 for worker in fleet["workers"])
            totals = fleet["router"]
            if told == workers and totals["links"] >= workers * procs and totals.get("processes", 1) == procs:
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"the router does not come up with {workers} workers")
        time.sleep(0.1)


def asked(port: int, path: str) -> Any:
    """What the router answers to a GET."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        return json.load(answer)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its descendants, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return own + sum(cpu_seconds(int(child)) for child in children)


def memory_mib(pid: int) -> float:
    """Resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True)
class Running:
    """A router, or several on one port, with workers behind."""

    port: int
    pid: int
    watched: Path  # what `watch_loop` wrote

    def stalls(self, since: float, until: float) -> dict[str, float]:
        """The event loop's longest ones between two times of `time.time`; `usual`: of half of the seconds."""
        rows = [list(map(float, line.split())) for line in self.watched.read_text().splitlines()]
        found = [row for row in rows if since <= row[0] <= until]
        most: dict[int, float] = {}
        for at, _, cpu_ms in found:
            most[int(at)] = max(cpu_ms, most.get(int(at), 0.0))
        return {
            "latest_ms": max(row[1] for row in found),
            "most_cpu_ms": max(most.values()),
            "usual_most_cpu_ms": statistics.median(most.values()),
        }


@contextlib.contextmanager
def fleet(
    step_ms: float, *, workers: int = 1, procs: int = 1, first_at_once: bool = False, watched: bool = False
) -> Iterator[Running]:
    """Router processes with instant workers behind them; `watched`: its event loop's stalls are told."""
    redis_port, port = free_port(), free_port()
    url = f"redis://127.0.0.1:{redis_port}/0"
    environment = child_environment() | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet = {"stdout": subprocess.DEVNULL, "env": environment}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stalls = Path(folder) / "stalls"
        redis = [find_redis_server(), "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        router = [sys.executable, "-m", "penstock", "router"]
        if watched:
            router = [sys.executable, __file__, "--watch", str(stalls), "router"]
        router += [str(MODEL), "--redis-url", url, "--port", str(port), "--router-procs", str(procs)]
        router += ["--served-model-name", "bench", "--log-level", "warning"]
        worker = [sys.executable, __file__, "--worker", url, "--step-ms", str(step_ms)]
        stack.enter_context(process(redis, **quiet))
        for number in range(workers):
            more = ["--number", str(number), *(["--first-at-once"] if first_at_once else [])]
            stack.enter_context(process([*worker, *more], **quiet))
        child = stack.enter_context(process(router, **quiet))
        wait_ready(port, workers, procs)
        yield Running(port, child.pid, stalls)


def child_environment() -> dict[str, str]:
    """Ours, with this checkout importable, wherever it was started."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def clients_apart(port: int, request: Path, streams: int, requests: int, processes: int) -> float:
    """Seconds in which so many processes of clients, with `requests` each, were all answered."""
    command = [sys.executable, __file__, "--client", str(port), "--request", str(request)]
    command += ["--streams", str(streams), "--requests", str(requests)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment()) for _ in range(processes)]
    spans = [json.loads(one.communicate()[0]) for one in running]
    return float(max(end for _, end in spans) - min(start for start, _ in spans))


# ---------------------------------------------------------------- as a program


async def watch_loop(path: Path) -> None:
    """How late the event loop comes to a timer of 1 ms: a line for each window, with the latest and the most CPU time
    that the loop's thread used meanwhile, in ms. Late without CPU time is waiting: for a core, or the interpreter lock.
    """
    late = cpu = 0.0
    written = time.time()
    with path.open("w", buffering=1) as out:
        while True:
            before, cpu_before = time.perf_counter(), time.thread_time()
            await asyncio.sleep(TIMER_S)
            late = max(late, time.perf_counter() - before - TIMER_S)
            cpu = max(cpu, time.thread_time() - cpu_before)
            if time.time() - written > WINDOW_S:
                written = time.time()
                out.write(f"{written} {late * 1e3:.2f} {cpu * 1e3:.2f}\n")
                late = cpu = 0.0


def watched_router(path: Path, arguments: list[str]) -> None:
    """`penstock router`, with its event loop watched."""
    from penstock import cli
    from penstock.router import server

    class Watched(server.RouterServer):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            self.watcher = asyncio.ensure_future(watch_loop(path))

    server.RouterServer = Watched  # type: ignore[misc]
    raise SystemExit(cli.main(arguments))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", metavar="REDIS_URL")
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--first-at-once", action="store_true")
    parser.add_argument("--client", type=int, metavar="PORT")
    parser.add_argument("--request", type=Path)
    parser.add_argument("--streams", type=int)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--watch", type=Path)
    options, router = parser.parse_known_args()
    if options.worker:
        vocab_size = Tokenizer.load(str(MODEL)).vocab_size
        InstantWorker(options.worker, vocab_size, options.step_ms / 1e3, options.number, options.first_at_once).run()
    elif options.client:
        start = time.time()
        uvloop.run(drive(options.client, options.request.read_bytes(), options.streams, options.requests))
        print(json.dumps([start, time.time()]))
    else:
        watched_router(options.watch, router)


if __name__ == "__main__":
    main()
