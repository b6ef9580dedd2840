"""A fleet on CPU under load for as long as you like, with everything in it coming and going.

    python benchmarks/soak.py [--minutes 30] [--rate 6] [--warm-up 24000]

Two router processes, one prefill and two decode workers of a tiny model and their Redis. First `--warm-up` requests as
fast as they go, until the heaps have grown to their size: a router's takes 12,000. Then prompts of shared prefixes at
`--rate` a second, and meanwhile, by a fixed plan over the time: workers are killed with -9, another one joins, leaves
in order, joins again and is killed, one of the routers is told to end and later killed, Redis is killed twice. Then

- every answer was exact (Hugging Face's tokens) or a typed error within its deadline; a request whose router was killed
  is asked once more, as a client would (`asked_again_after_a_router_died`; answered then, or the run fails),
- nothing is held, lent or reserved anywhere,
- memory of the router that lived throughout does not grow in the second half, in which everything has happened before;
  nor does what Redis keeps for the fleet since its last restart (its keys: Lua's garbage and clients' buffers come and
  go): slope and noise,
- hits that routers predicted were found by the workers: `hits_apart` compares the sums, `hits_missed` is the share of
  predicted ones that were not found, request by request.

Records benchmarks/results/soak-COMMIT.json, and fails if any of it does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

import itertools

import httpx
import psutil
import redis
from openai import APIConnectionError, APIError, AsyncOpenAI

from benchmarks import record
from penstock.fleet import Fleet
from tests.system.chaos import DEADLINE_S, ChaosFailure, code_of
from tests.system.fleets import SHORT_LEASE_S, assert_idle, complete, fleet, open_client, wait_restarted
from tests.tiny_models import make_checkpoint, random_prompts, reference_tokens

PREFIXES, SUFFIXES = 8, 5
PREFIX_TOKENS, SUFFIX_TOKENS, NEW_TOKENS = 96, 12, 16
SAMPLE_S = 1.0
BLOCKS = 20  # of samples, each one point of the regression
WARM_UP_STREAMS, WARM_UP_TOKENS = 16, 2
HITS_APART = 0.02
# Of the whole time, in order. The second router process and the first workers are those that suffer.
PLAN = (
    (0.10, "kill decode-0"),
    (0.18, "join"),
    (0.25, "end router-1"),
    (0.33, "kill redis"),
    (0.42, "leave"),
    (0.48, "kill prefill-0"),
    (0.55, "join"),
    (0.60, "kill redis"),
    (0.66, "kill router-1"),
    (0.74, "kill joined"),
    (0.80, "kill decode-1"),
)


@dataclass
class Soak:
    """What happened."""

    exact: int = 0
    typed: Counter[str] = field(default_factory=Counter)
    cut: int = 0  # asked once more, as their router was being restarted
    slowest_s: float = 0.0
    events: list[tuple[float, str]] = field(default_factory=list)  # seconds since the start
    router_bytes: list[tuple[float, float]] = field(default_factory=list)
    redis_bytes: list[tuple[float, float]] = field(default_factory=list)  # of all keys
    predicted: int = 0
    realised: int = 0
    missed: int = 0


@dataclass(frozen=True)
class Trend:
    """Growth of a series, and how far chance alone may take it (two standard errors)."""

    kib_per_minute: float
    noise_kib_per_minute: float

    @property
    def grows(self) -> bool:
        """More than chance explains."""
        return self.kib_per_minute > self.noise_kib_per_minute


def trend(samples: Sequence[tuple[float, float]]) -> Trend | None:
    """A straight line through the means of `BLOCKS` blocks of (seconds, bytes); None: too few samples to tell.

    Memory now is memory a while ago and a little: residuals are not independent, and by how much the blocks are fewer
    than they look is read off their correlation with their neighbours (Santer et al. 2000, doi 10.1029/1999JD901105).
    """
    points = block_means(samples)
    if not points:
        return None
    x = [at / 60 for at, _ in points]
    y = [value / 1024 for _, value in points]
    slope, intercept = statistics.linear_regression(x, y)
    rest = [b - intercept - slope * a for a, b in zip(x, y, strict=True)]
    squares = sum(one * one for one in rest)
    alike = sum(one * next_one for one, next_one in itertools.pairwise(rest)) / squares if squares else 0.0
    alike = min(0.8, max(0.0, alike))
    independent = max(3.0, BLOCKS * (1 - alike) / (1 + alike))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    return Trend(round(slope, 2), round(2 * (squares / (independent - 2) / spread) ** 0.5, 2))


def block_means(samples: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of `BLOCKS` blocks of (seconds, bytes); none if there are too few."""
    size = len(samples) // BLOCKS
    if size < 3:
        return []
    blocks = [samples[i * size : (i + 1) * size] for i in range(BLOCKS)]
    return [
        (statistics.fmean(at for at, _ in block), statistics.fmean(value for _, value in block)) for block in blocks
    ]


class Churn:
    """Carries out the plan."""

    def __init__(self, running: Fleet, soak: Soak, started: float) -> None:
        self._running, self._soak, self._started = running, soak, started
        self._joined: subprocess.Popen[bytes] | None = None
        self.router_gone: list[tuple[float, float]] = []  # when connections may have been cut: from, until

    def carry_out(self, action: str) -> None:
        """One action, until the fleet is whole again."""
        self._soak.events.append((round(time.monotonic() - self._started, 1), action))
        verb, _, name = action.partition(" ")
        if verb == "join":
            self._join()
        elif action == "leave":
            self.end_joined(signal.SIGTERM)
        elif action == "kill joined":
            self.end_joined(signal.SIGKILL)
        else:
            pid = self._running.group.pids()[name]
            gone_at = time.monotonic()
            self._running.kill(name, signal.SIGKILL if verb == "kill" else signal.SIGTERM)
            wait_restarted(self._running, name, pid, 120)
            if name.startswith("router"):
                self.router_gone.append((gone_at, time.monotonic()))

    def _join(self) -> None:
        config = self._running.config
        command = [sys.executable, "-m", "penstock", "decode", config.model, "--redis-url", config.redis_url]
        command += ["--worker-id", "joined", "--device", "cpu", "--lease-s", str(SHORT_LEASE_S), "--cpu-threads", "1"]
        command += ["--block-size", str(config.block_size), "--kv-cache-memory-bytes", "16MiB", "--drain-s", "5"]
        command += ["--served-model-name", "tiny"]
        self._joined = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end_joined(self, number: signal.Signals) -> None:
        """End the worker that joined, if there is one."""
        if self._joined is not None:
            self._joined.send_signal(number)
            self._joined.wait(60)
            self._joined = None

    def may_be_cut(self, since: float) -> bool:
        """A router was being restarted at some time since then."""
        return any(until >= since for _, until in self.router_gone) or len(self.router_gone) < sum(
            "router" in action for _, action in self._soak.events
        )


async def soak(running: Fleet, minutes: float, rate: float, prompts: list[list[int]], oracle: list[list[int]]) -> Soak:
    """Load, plan and samples, until the time is over and every answer is there."""
    found, started = Soak(), time.monotonic()
    churn = Churn(running, found, started)
    chooser = random.Random(1)
    total_s = 60 * minutes

    async def ask(client: AsyncOpenAI, index: int, stream: bool) -> None:
        began = time.monotonic()
        for again in (False, True):
            sent = time.monotonic()
            try:
                tokens = await complete(client, prompts[index], NEW_TOKENS, stream=stream)
                if tokens[: len(oracle[index])] != oracle[index] or len(tokens) != NEW_TOKENS:
                    raise ChaosFailure(f"prompt {index}: {tokens} instead of {oracle[index]}")
                found.exact += 1
                break
            except (APIConnectionError, httpx.TransportError) as error:
                if again or not churn.may_be_cut(sent):
                    raise ChaosFailure(f"the connection was lost without a reason: {error!r}") from error
                found.cut += 1
            except (APIError, httpx.HTTPError) as error:
                found.typed[code_of(error)] += 1
                break
        found.slowest_s = max(found.slowest_s, round(time.monotonic() - began, 2))

    async def load(client: AsyncOpenAI) -> None:
        asked: set[asyncio.Task[None]] = set()
        while time.monotonic() < started + total_s:
            await asyncio.sleep(chooser.expovariate(rate))
            asked.add(asyncio.create_task(ask(client, chooser.randrange(len(prompts)), chooser.random() < 0.5)))
            for one in [one for one in asked if one.done()]:
                asked.discard(one)
                one.result()
        await asyncio.gather(*asked)

    async def plan() -> None:
        for share, action in PLAN:
            await asyncio.sleep(max(0.0, started + share * total_s - time.monotonic()))
            await asyncio.to_thread(churn.carry_out, action)

    async def sample() -> None:
        router = psutil.Process(running.group.pids()["router-0"])
        while True:
            await asyncio.sleep(SAMPLE_S)
            at = time.monotonic() - started
            memory = router.memory_info()
            found.router_bytes.append((at, memory.rss - memory.shared))  # without code, read in as it is first run
            if (used := await asyncio.to_thread(_redis_bytes, running.config.redis_url)) is not None:
                found.redis_bytes.append((at, used))

    sampling = asyncio.create_task(sample())
    try:
        async with open_client(running.url, DEADLINE_S) as client:
            await asyncio.gather(load(client), plan())
    finally:
        sampling.cancel()
        await asyncio.to_thread(churn.end_joined, signal.SIGKILL)
    return found


async def warm_up(url: str, prompts: list[list[int]], number: int) -> None:
    """So many short requests."""
    left = iter(range(number))
    async with open_client(url, DEADLINE_S) as client:

        async def one_by_one() -> None:
            for i in left:
                await complete(client, prompts[i % len(prompts)], WARM_UP_TOKENS, stream=i % 2 == 0)

        await asyncio.gather(*(one_by_one() for _ in range(WARM_UP_STREAMS)))


def run(minutes: float, rate: float, directory: Path, warming: int = 0) -> dict[str, Any]:
    """One soak; raises `ChaosFailure` or an assertion if an answer was wrong or lost, or something is left.

    Returns the record.
    """
    path = make_checkpoint("llama", directory / "llama")
    prefixes = random_prompts([PREFIX_TOKENS] * PREFIXES, seed=1)
    suffixes = random_prompts([SUFFIX_TOKENS] * SUFFIXES, seed=2)
    prompts = [prefix + suffix for prefix in prefixes for suffix in suffixes]
    oracle = reference_tokens(path, prompts, NEW_TOKENS, until_tie=True)
    options = {"prefill_workers": 1, "decode_workers": 2, "router_procs": 2, "cpu_threads": 1, "lease_s": SHORT_LEASE_S}
    with nothing_left(), fleet(path, **options) as running:
        asyncio.run(warm_up(running.url, prompts, warming))
        found = asyncio.run(soak(running, minutes, rate, prompts, oracle))
        running.wait_ready(60)
        assert_idle(running)
        found.predicted = _total(running.url, "penstock:predicted_hit_tokens_total")
        found.realised = _total(running.url, "penstock:realised_hit_tokens_total")
        found.missed = _total(running.url, "penstock:missed_hit_tokens_total")
    last_redis = max((at for at, action in found.events if action == "kill redis"), default=0.0)
    half = 60 * minutes / 2
    router = trend([one for one in found.router_bytes if one[0] > half])
    shared = trend([one for one in found.redis_bytes if one[0] > max(half, last_redis + 10)])
    return {
        "minutes": minutes,
        "warm_up_requests": warming,
        "rate": rate,
        "requests": found.exact + sum(found.typed.values()),
        "exact": found.exact,
        "typed_errors": dict(found.typed),
        "asked_again_after_a_router_died": found.cut,
        "slowest_s": found.slowest_s,
        "router_mib": [round(found.router_bytes[i][1] / 2**20, 2) for i in (0, -1)],
        "redis_keys_kib": [round(found.redis_bytes[i][1] / 2**10, 1) for i in (0, -1)],
        "router_mib_blocks": [[round(at), round(of / 2**20, 2)] for at, of in block_means(found.router_bytes)],
        "redis_keys_kib_blocks": [[round(at), round(of / 2**10, 1)] for at, of in block_means(found.redis_bytes)],
        "router_memory": router and {**asdict(router), "grows": router.grows},
        "redis_memory": shared and {**asdict(shared), "grows": shared.grows},
        "predicted_hit_tokens": found.predicted,
        "realised_hit_tokens": found.realised,
        "hits_missed": round(found.missed / max(1, found.predicted), 4),
        "hits_apart": round(abs(found.predicted - found.realised) / max(1, found.realised), 4),
        "events": found.events,
    }


@contextmanager
def nothing_left() -> Iterator[None]:
    """No child process is left behind."""
    before = set(psutil.Process().children(recursive=True))
    yield
    new = set(psutil.Process().children(recursive=True)) - before
    left = [child for child in new if "penstock" in " ".join(_words(child))]
    assert not left, left


def _words(process: psutil.Process) -> list[str]:
    return _or_none(process.cmdline) or []


def _or_none(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except psutil.NoSuchProcess:
        return None


def _redis_bytes(url: str) -> float | None:
    """What all keys of Redis take; None while it is away."""
    client = redis.Redis.from_url(url, socket_timeout=1)
    try:
        pipeline = client.pipeline(transaction=False)
        for key in client.scan_iter(count=1000):
            pipeline.memory_usage(key, samples=0)
        return float(sum(size or 0 for size in pipeline.execute()))  # a key may have expired meanwhile
    except redis.RedisError:
        return None
    finally:
        client.close()


def _total(url: str, name: str) -> int:
    """A counter of all router processes. One that was restarted has lost what it had counted, of all kinds alike."""
    lines = httpx.get(f"{url}/metrics", timeout=20).text.splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")))


def _run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    return run(options.minutes, options.rate, directory, options.warm_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second")
    parser.add_argument("--warm-up", type=int, default=24_000, help="requests before the time begins")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/soak-COMMIT.json")
    options = parser.parse_args()
    commit = record.commit()
    with tempfile.TemporaryDirectory() as directory:
        result = {"commit": commit, "machine": record.machine(), **_run(options, Path(directory))}
    output = options.output or record.RESULTS / record.file_name("soak", commit)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    trends = [result["router_memory"], result["redis_memory"]]
    if any(one and one["grows"] for one in trends) or result["hits_apart"] > HITS_APART:
        raise SystemExit("memory grows, or hits are not as predicted")


if __name__ == "__main__":
    main()
