"""Do several routers balance as well as one? The same requests through one router, and through four at once.

    python benchmarks/several_routers.py [--requests 4000] [--routers 4]

Routers, Redis and bus are real, in one process; workers answer a token a step and compute nothing. `equal`: requests of
100 prompt tokens and 2 of output. `mixed`: 20 to 1000 prompt tokens (their logarithm uniform) and 2 to 12 of output.
Balance is max/mean over the workers of the tokens they were given. At the end each router must have given back all that
it had reserved, here and in Redis. Records benchmarks/results/several_routers-COMMIT.json, and fails if with several
routers it is worse by more than 0.03.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks import record
from tests.conftest import RedisServer
from tests.router.fake_worker import FakeWorker
from tests.router.services import ended, request, routers, send

WORKERS = 4
IN_FLIGHT = 24
WORSE = 0.03
Sizes = list[tuple[int, int]]  # tokens of prompt and output


def sizes(kind: str, number: int) -> Sizes:
    chance = random.Random(7)
    if kind == "equal":
        return [(100, 2)] * number
    return [(int(20 * 50 ** chance.random()), chance.randint(2, 12)) for _ in range(number)]


async def balance(url: str, workers: Sequence[FakeWorker], count: int, asked: Sizes) -> float:
    """max/mean of tokens given, with so many routers, which are asked in turn."""
    for worker in workers:
        worker.submitted.clear()
    async with routers(url, count, len(workers)) as services:
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def one(number: int, prompt: int, output: int) -> bool:
            async with slots:
                ids = [random.randrange(1000) for _ in range(prompt)]
                sink = await send(services[number % count], request(f"r{number}", output, prompt=ids))
                await ended(sink)
            return sink.complete()

        answers = await asyncio.gather(*(one(number, *size) for number, size in enumerate(asked)))
    assert all(answers), "every request is answered, as it should be"
    given = [
        sum(len(one.prompt_token_ids) + (one.sampling.max_tokens or 0) for one in worker.submitted)
        for worker in workers
    ]
    assert sum(given) == sum(map(sum, asked)), "every request is at one worker, once"
    return round(max(given) * len(given) / sum(given), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--routers", type=int, default=4)
    options = parser.parse_args()
    found: dict[str, Any] = {"requests": options.requests, "workers": WORKERS, "in_flight": IN_FLIGHT}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = RedisServer(Path(folder))
        server.start()
        stack.callback(server.stop)
        workers = [FakeWorker(server.url, f"d{number}") for number in range(WORKERS)]
        for worker in workers:
            stack.callback(worker.close)
        for kind in ("equal", "mixed"):
            asked = sizes(kind, options.requests)
            found[kind] = {
                f"routers_{count}": asyncio.run(balance(server.url, workers, count, asked))
                for count in (1, options.routers)
            }
        with contextlib.closing(server.client()) as client:
            left = [key for key in client.scan_iter("penstock:load:*") if client.hgetall(key)]
        assert not left, f"reserved for ever: {left}"
    print(json.dumps(found, indent=1))
    commit = record.commit()
    path = record.RESULTS / record.file_name("several_routers", commit)
    path.write_text(json.dumps({"commit": commit, "machine": record.machine(), **found}, indent=1) + "\n")
    if any(found[kind][f"routers_{options.routers}"] > found[kind]["routers_1"] + WORSE for kind in ("equal", "mixed")):
        raise SystemExit("several routers balance worse than one")


if __name__ == "__main__":
    main()
