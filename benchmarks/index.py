"""The prefix index on a Redis of its own: look-ups a second and their p99, bytes a page, pages written a second.

    python benchmarks/index.py [--workers 64] [--pages 10000000] [--page-size 16] [--prompt-tokens 8000 100000]

Every worker announces, through the production writer, its share of `--pages`: of one long prompt the first part,
worker i as much as (i + 1) / workers ("stairs": the most that a look-up can have to find out); another one whole, as
all others do ("all"); and pages that only it holds, in prompts of 512 pages but for one long prompt ("one"). Look-ups
are `FleetReader.look_up`, so packing in Python and redis-py are in them. Records benchmarks/results/index-COMMIT.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks import record
from penstock.common.announcements import Announcements
from penstock.common.index_writer import IndexWriter, Sweeper
from penstock.common.page_hash import DIGEST_BYTES, chained
from penstock.common.redis_state import FleetReader
from penstock.common.router_redis import AWAY_S
from penstock.private_redis import find_redis_server, free_port

NAMESPACE = "bench"
LEASE_S = 3600.0
CONCURRENT = 16
OWN_PROMPT_PAGES = 512


@contextmanager
def redis_server() -> Iterator[str]:
    """A redis-server without a memory limit; yields its URL."""
    port = free_port()
    flags = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--loglevel", "warning"]
    process = subprocess.Popen([find_redis_server(), *flags], stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(port=port)
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        client.close()
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def random_hashes(count: int) -> list[bytes]:
    """Page hashes are uniform, so random bytes stand for them."""
    joined = os.urandom(count * DIGEST_BYTES)
    return [joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)]


def incarnation(worker: int) -> str:
    return f"decode-{worker}-0123456789ab"


class Fleet:
    """The pages of all workers, as they are written."""

    def __init__(self, workers: int, pages: int, longest: int) -> None:
        self.workers = [incarnation(worker) for worker in range(workers)]
        self.all, self.stairs = random_hashes(longest), random_hashes(longest)
        self.one: list[bytes] = []  # of the last worker
        self._share = pages // workers

    def announce(self, client: redis.Redis) -> int:
        """Write everything; returns how many pages that were, counted once for each holder."""
        written = 0
        for number, name in enumerate(self.workers):
            shared = chained(self.all) + chained(
                self.stairs[: int(len(self.stairs) / len(self.workers) * (number + 1))]
            )
            own = max(len(self.all), self._share - len(shared))
            self.one = random_hashes(own)
            alone = chained(self.one[: len(self.all)])
            for start in range(len(self.all), own, OWN_PROMPT_PAGES):
                alone += chained(self.one[start : start + OWN_PROMPT_PAGES])
            announcements = Announcements(1 << 62)
            announcements.publish(shared + alone, [])
            writer = IndexWriter(client, NAMESPACE, name, LEASE_S)
            writer.enter(0)
            while (batch := announcements.next()) is not None:
                assert writer.write(batch)
                announcements.acknowledged()
            written += announcements.num_held
        return written

    def prompts(self, count: int) -> dict[str, tuple[Callable[[], list[bytes]], Callable[[int], int]]]:
        """Name of a case -> a prompt of `count` pages, and of how many of them a worker holds."""
        last, stairs = len(self.workers) - 1, len(self.stairs) / len(self.workers)
        return {
            "none": (lambda: random_hashes(count), lambda number: 0),
            "one": (lambda: self.one[:count], lambda number: count if number == last else 0),
            "all": (lambda: self.all[:count], lambda number: count),
            "stairs": (lambda: self.stairs[:count], lambda number: min(count, int(stairs * (number + 1)))),
        }


async def look_ups(
    client: redis.Redis,
    url: str,
    workers: list[str],
    prompt: Callable[[], list[bytes]],
    expected: Callable[[int], int],
    seconds: float,
) -> dict[str, float]:
    """One at a time, then `CONCURRENT` at once; every answer is checked. `expected`: worker number -> pages."""
    reader = FleetReader(url, NAMESPACE, "bench")
    answers = {name: expected(number) for number, name in enumerate(workers)}

    async def one() -> float:
        hashes = prompt()
        began = time.perf_counter()
        while (found := await reader.look_up(workers, hashes)) is None:  # it took longer than a router waits
            await asyncio.sleep(AWAY_S)
        took = time.perf_counter() - began
        assert {name: each.held_pages for name, each in found.items()} == answers
        return took

    async def many(until: float) -> int:
        done = 0
        while time.perf_counter() < until:
            await one()
            done += 1
        return done

    try:
        await one()
        times: list[float] = []
        busy_s = _server_s(client)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            times.append(await one())
        busy_s = _server_s(client) - busy_s
        began = time.perf_counter()
        done = sum(await asyncio.gather(*(many(began + seconds) for _ in range(CONCURRENT))))
        rate = done / (time.perf_counter() - began)
        failures = reader.failures
    finally:
        await reader.close()
    return {
        "p50_ms": round(statistics.median(times) * 1e3, 3),
        "p99_ms": round(statistics.quantiles(times, n=100)[98] * 1e3, 3),
        "server_us": round(busy_s / len(times) * 1e6),
        "look_ups_per_s": round(rate),
        "failures": failures,
    }


def _server_s(client: redis.Redis) -> float:
    """CPU seconds that the server has used."""
    cpu = client.info("cpu")
    return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])


def measure(workers: int, pages: int, page_size: int, prompt_tokens: list[int], seconds: float) -> dict[str, Any]:
    with redis_server() as url, redis.Redis.from_url(url) as client:
        fleet = Fleet(workers, pages, max(prompt_tokens) // page_size)
        empty = client.info("memory")["used_memory"]
        began = time.perf_counter()
        busy_s = _server_s(client)
        written = fleet.announce(client)
        busy_s = _server_s(client) - busy_s
        took = time.perf_counter() - began
        used = client.info("memory")["used_memory"] - empty
        result: dict[str, Any] = {
            "redis": client.info("server")["redis_version"],
            "pages": written,
            "bytes_per_page": round(used / written, 1),
            "used_memory_mib": round(used / 2**20),
            "written_per_s": round(written / took),
            "server_us_per_page_written": round(busy_s / written * 1e6, 2),
        }
        print(result, flush=True)
        for tokens in prompt_tokens:
            for case, (prompt, expected) in fleet.prompts(tokens // page_size).items():
                key = f"tokens{tokens}_{case}"
                result[key] = asyncio.run(look_ups(client, url, fleet.workers, prompt, expected, seconds))
                print(key, result[key], flush=True)
        result["sweep"] = sweep(client, fleet.workers)
        print("sweep", result["sweep"], flush=True)
    return result


def sweep(client: redis.Redis, workers: list[str]) -> dict[str, float]:
    """One worker dies; another one takes it out of the index, without the pauses of production."""
    client.delete(f"{NAMESPACE}:index:{workers[0]}")
    sweeper = Sweeper(client, NAMESPACE, workers[1], LEASE_S)
    sweeper.begin()
    times: list[float] = []
    more = True
    while more:
        began = time.perf_counter()
        more = sweeper.step()
        times.append(time.perf_counter() - began)
    return {"pieces": len(times), "p99_ms": round(statistics.quantiles(times, n=100)[98] * 1e3, 2)} | {
        "total_s": round(sum(times), 2)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--pages", type=int, default=10_000_000, help="of all workers together")
    parser.add_argument("--page-size", type=int, default=16, help="tokens")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[8000, 100_000])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each kind of look-up, one at a time and at once")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    at_commit = record.commit()
    key = f"w{options.workers}_p{options.pages}_t{options.page_size}"
    figures = measure(options.workers, options.pages, options.page_size, options.prompt_tokens, options.seconds)
    path = options.out or record.RESULTS / record.file_name("index", at_commit)
    record.merge(path, record.machine(), at_commit, {key: figures})
    print(path)


if __name__ == "__main__":
    main()
