"""The simulator against the truth: a real fleet on CPU and its simulation, on the same requests.

    python benchmarks/simulator_truth.py [--workers 4] [--requests 400] [--utilisation 0.5] [--record]

Starts Redis, a router and workers with a model of one layer. Their steps are computed on CPU and then held until a
modelled device would have done them (paced_worker.py; `--slower` than that): so workers do not wait for each other's
cores, as those of a real fleet do not. All else is real: tokens, pages, prefixes, bus, Redis, HTTP.

First some requests one by one: what HTTP, router and bus add to a first token is what their times exceed the workers'
own rates by (measured as always, read from /metrics). Then a load of the kind to come, from which the workers measure
the rates that they have under it. Then the load that counts, with other prompts: each request is sent at its time, and
the simulator gets the same requests with those rates. Prints mean time to first token and hit ratio of both, and how
far they are apart; `--record` writes benchmarks/results/simulator_truth-<commit>.json. Workers do not read prefixes
from each other here: over one machine's memory that is no model of a network.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks.paced_worker import PACE_ENV, Pace
from benchmarks.record import RESULTS, commit, file_name, machine, merge
from penstock.bench.client import ask, run_load
from penstock.bench.questions import Question
from penstock.bench.serving_metrics import RequestRecord
from penstock.common.messages import MeasuredRates
from penstock.http_client import connect
from penstock.router.rates import WorkerRates, typical
from penstock.simulate.result import Slo
from penstock.simulate.runs import compare, scaled
from penstock.simulate.simulator import FleetShape
from penstock.simulate.trace import TracedRequest
from tests.conftest import RedisServer
from tests.system.fleets import router
from tests.tiny_models import make_checkpoint
from tests.workers.worker_processes import workers

PAGE = 16
TENANTS = 24
SHARED_PAGES = (20, 60)  # of a tenant's beginning
OWN_PAGES = (5, 40)
OUTPUT = (8, 24)
CALIBRATION = 60  # requests one by one
WARM_UP = 120  # requests of the first load
PACE = Pace(step_ms=20.0, prompt_token_ms=0.5, sequence_ms=0.5, context_token_ms=0.0005)  # no step is faster here
LEASE_S = 10
STEP_TOKENS = 2048
MODEL, VOCABULARY, TOKEN_BYTES = "truth", 1000, 2 * 1 * 2 * 16 * 4  # one layer of two KV heads of 16, float32


@dataclass(frozen=True)
class Asked:
    """A request of the trace with the token ids that its pages stand for."""

    traced: TracedRequest
    tokens: list[int]


def generated(number: int, vocab_size: int, seed: int) -> list[Asked]:
    """Requests one a second on average; each begins as its tenant's do, small tenant numbers come more often.

    Those of another seed have no page in common with them.
    """
    chance = random.Random(seed)
    first = 100_000_000 * (seed + 1)
    beginnings = [
        tuple(range(at, at + chance.randint(*SHARED_PAGES))) for at in range(first, first + TENANTS * 1000, 1000)
    ]
    own, now_ms, found = first + TENANTS * 1000, 0.0, []
    for _ in range(number):
        pages = [*beginnings[min(int(TENANTS ** chance.random()), TENANTS) - 1]]
        count = chance.randint(*OWN_PAGES)
        pages += range(own, own + count)
        own += count
        tokens = [t for page in pages for t in page_tokens(page, vocab_size)]
        traced = TracedRequest(now_ms, len(tokens), chance.randint(*OUTPUT), tuple(pages))
        found.append(Asked(traced, tokens))
        now_ms += chance.expovariate(1e-3)
    return found


def timed(asked: Sequence[Asked], shape: FleetShape, utilisation: float) -> list[Asked]:
    """The same requests at times at which their work fills this share of the fleet's."""
    traced = scaled([one.traced for one in asked], shape, utilisation)
    return [replace(one, traced=at) for one, at in zip(asked, traced, strict=True)]


def page_tokens(page: int, vocab_size: int) -> list[int]:
    """The token ids of a page: always the same."""
    chance = random.Random(page)
    return [chance.randrange(3, vocab_size) for _ in range(PAGE)]


async def send(url: str, requests: Sequence[Asked], *, one_by_one: bool = False) -> list[float]:
    """Each at its time, or one after the other; times to first token in milliseconds, in order.

    Raises:
        RuntimeError: one was not answered.
    """
    fixed = {"model": MODEL, "temperature": 0.0, "ignore_eos": True}
    questions = [Question(asked.tokens, len(asked.tokens), asked.traced.output_tokens) for asked in requests]
    times = [0.0 if one_by_one else asked.traced.arrival_ms / 1e3 for asked in requests]
    async with connect(url) as client:

        async def one(number: int, question: Question) -> RequestRecord:
            return await ask(client, "/v1/completions", "openai", fixed, question, f"truth-{number}")

        records, _ = await run_load(questions, times, one, max_concurrency=1 if one_by_one else None)
    if errors := [record.error for record in records if record.error]:
        raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
    return [record.ttft * 1e3 for record in records]


@contextlib.contextmanager
def fleet(count: int, pages: int, pace: Pace, folder: Path) -> Iterator[str]:
    """The URL of a router with so many workers behind it, each with so many pages."""
    model = make_checkpoint("llama", folder / "model", num_hidden_layers=1, vocab_size=VOCABULARY)
    names = {f"decode-{number}": "decode" for number in range(count)}
    flags: dict[str, Any] = {"block_size": PAGE, "kv_cache_memory_bytes": pages * PAGE * TOKEN_BYTES}
    flags |= {"dtype": "float32", "max_num_batched_tokens": STEP_TOKENS, "lease_s": LEASE_S}
    named = {"served_model_name": MODEL}
    os.environ |= {"PENSTOCK_FETCH_PREFIXES": "false", PACE_ENV: json.dumps(asdict(pace))}
    with contextlib.ExitStack() as stack:
        redis = RedisServer(folder)
        redis.start()
        stack.callback(redis.stop)
        stack.enter_context(workers(redis.url, model, names, module="benchmarks.paced_worker", **flags, **named))
        url = stack.enter_context(router(redis.url, model, lease_s=LEASE_S, **named))
        while len(fleet_of(url)["workers"]) < count:
            time.sleep(0.1)
        yield url


def fleet_of(url: str) -> dict[str, Any]:
    """What GET /fleet says."""
    with urllib.request.urlopen(f"{url}/fleet", timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def totals(url: str, *names: str) -> list[int]:
    """These totals, over all workers, once their last reports have come."""
    time.sleep(1.5)
    return [sum(worker["totals"][name] for worker in fleet_of(url)["workers"]) for name in names]


def measured_rates(url: str) -> WorkerRates:
    """The mean of what the workers have measured of themselves."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
        return rates_in(answer.read().decode())


def rates_in(exposition: str) -> WorkerRates:
    """The mean of the workers' measured rates in the text of a router's /metrics."""
    known = {field.name for field in fields(WorkerRates)}
    rows = rates_by_worker(exposition).values()
    return typical(MeasuredRates(**{k: v for k, v in row.items() if k in known}) for row in rows)


def rates_by_worker(exposition: str) -> dict[str, dict[str, float]]:
    """What each worker, by its name, has measured of itself, in the text of a router's /metrics."""
    rows: dict[str, dict[str, float]] = {}
    for line in exposition.splitlines():
        name, _, rest = line.partition("{")
        if name.startswith("penstock:measured_"):
            engine = rest.partition('engine="')[2].partition('"')[0]
            rows.setdefault(engine, {})[name.removeprefix("penstock:measured_")] = float(line.rpartition(" ")[2])
    return rows


def calibrate(url: str, vocab_size: int) -> tuple[WorkerRates, float]:
    """(rates, milliseconds that everything but the worker adds to a first token)."""
    chance = random.Random(99)
    alone = []
    for number in range(CALIBRATION):
        pages = range(10_000_000 + number * 1000, 10_000_000 + number * 1000 + chance.randint(5, 100))
        tokens = [t for page in pages for t in page_tokens(page, vocab_size)]
        alone.append(Asked(TracedRequest(0.0, len(tokens), chance.randint(*OUTPUT), tuple(pages)), tokens))
    ttft = asyncio.run(send(url, alone, one_by_one=True))
    totals(url, "steps")
    rates = measured_rates(url)
    added = [t - rates.prefill_ms(len(one.tokens)) for t, one in zip(ttft, alone, strict=True)]
    return rates, statistics.median(added[CALIBRATION // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--utilisation", type=float, default=0.5, help="of each worker's time")
    parser.add_argument("--pages", type=int, default=2000, help="a worker's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slower", type=float, default=2.0, help="pace of the workers; more on a busy machine")
    parser.add_argument("--record", action="store_true")
    flags = parser.parse_args()
    pace = PACE.slower(flags.slower)
    with tempfile.TemporaryDirectory() as folder, fleet(flags.workers, flags.pages, pace, Path(folder)) as url:
        num_pages = fleet_of(url)["workers"][0]["pages"]["total"]
        alone, added_ms = calibrate(url, VOCABULARY)
        shape = FleetShape(
            flags.workers,
            num_pages,
            PAGE,
            token_bytes=TOKEN_BYTES,
            rates=alone,
            max_num_batched_tokens=STEP_TOKENS,
        )
        warm_up = timed(generated(WARM_UP, VOCABULARY, flags.seed + 1), shape, flags.utilisation)
        asyncio.run(send(url, warm_up))
        totals(url, "steps")
        rates = measured_rates(url)
        asked = timed(generated(flags.requests, VOCABULARY, flags.seed), shape, flags.utilisation)
        traced = [one.traced for one in asked]
        before = totals(url, "prefix_queries", "prefix_hits")
        ttft = asyncio.run(send(url, asked))
        after = totals(url, "prefix_queries", "prefix_hits")
        again = measured_rates(url)
    queries, hits = (b - a for a, b in zip(before, after, strict=True))
    (result,) = compare(traced, replace(shape, rates=rates), ["cost"], Slo())
    real = {"ttft_mean_ms": statistics.mean(ttft), "ttft_p50_ms": statistics.median(ttft), "hit_ratio": hits / queries}
    simulated = {
        "ttft_mean_ms": result.ttft_mean_ms + added_ms,
        "ttft_p50_ms": result.ttft_p50_ms + added_ms,
        "hit_ratio": result.hit_ratio,
    }
    for when, known in (("one by one", alone), ("under load", rates), ("during the load", again)):
        print(f"rates {when}: {asdict(known)}")
    print(f"added to a first token {added_ms:.2f} ms")
    print(f"{'':14} {'real':>9} {'simulated':>9}  apart")
    apart = {key: simulated[key] / real[key] - 1 for key in real}
    for key, value in real.items():
        print(f"{key:14} {value:9.3f} {simulated[key]:9.3f}  {100 * apart[key]:+.1f} %")
    if flags.record:
        at_commit = commit()
        updates = {
            "workers": flags.workers,
            "requests": flags.requests,
            "utilisation": flags.utilisation,
            "pace": asdict(pace),
            "span_s": traced[-1].arrival_ms / 1e3,
            "rates_one_by_one": asdict(alone),
            "rates": asdict(rates),
            "rates_during_load": asdict(again),
            "added_ms": added_ms,
            "real": real,
            "simulated": simulated,
            "apart": apart,
        }
        merge(RESULTS / file_name("simulator_truth", at_commit), machine(), at_commit, updates)


if __name__ == "__main__":
    main()
