"""The loads of online.py on a real fleet of one prefill and one decode worker whose steps take what an H200's take.

    python benchmarks/online_paced.py                      # every load, five times as slow: a quarter of an hour
    python benchmarks/online_paced.py --loads W1@24 W2@2 --mixed-chunk-tokens 256 --slower 4

Router, bus, Redis, scheduling, rates that workers measure, hand-offs: all is as `penstock serve` runs it, only that a
step of the tiny model is over when one of llama8b would be (paced_worker.py). So it shows what the simulator does not
know, without a GPU. Times are divided by --slower again; pages are small and move through shared memory.
Figures go into benchmarks/results/online_paced-COMMIT.json, with the keys of online.py; `rates` has what the workers
had measured of themselves after each load, as slow as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks.online import TABLE, run
from benchmarks.online_figures import Load, figures, read_loads, table
from benchmarks.paced_worker import PACE_ENV, Pace
from benchmarks.record import RESULTS, commit, file_name, machine, merge
from benchmarks.shape_folder import make_shape_folder
from benchmarks.shapes import SHAPES
from benchmarks.simulator_truth import fleet_of, rates_by_worker
from penstock.bench.serving_metrics import RequestRecord
from penstock.common.config import TWO_PHASE_MIXED_CHUNK_TOKENS
from penstock.http_client import connect
from tests.conftest import RedisServer
from tests.system.fleets import router
from tests.workers.worker_processes import workers

# Of llama8b on an H200: whole steps of prompts (2048 tokens in 47 ms, 8192 in 203, or 212 in four steps), and steps
# with a chunk beside sequences (docs/performance.md).
PACES = {"prefill": Pace(3.0, 0.0205, 0.011, 0.0, 9.5e-7), "decode": Pace(4.2, 0.0135, 0.011, 2.6e-5, 9.5e-7)}
STEP_TOKENS = 8192  # as on a GPU
PAGE, NUM_PAGES = 64, 8000
SHAPE = replace(SHAPES["tiny"], max_position=16_384)
TOKEN_BYTES = SHAPE.layers * 2 * SHAPE.kv_heads * SHAPE.head_dim * 4
LEASE_S = 30
NAME = "bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a request got no answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--loads", nargs="+", default=list(TABLE), choices=list(read_loads()), metavar="NAME")
    parser.add_argument("--mixed-chunk-tokens", type=int, default=TWO_PHASE_MIXED_CHUNK_TOKENS)
    parser.add_argument("--slower", type=float, default=5.0, help="than the device; more on a busy machine")
    parser.add_argument("--most", type=int, help="requests of each load, the first ones")
    parser.add_argument("--out", type=Path, help="result file (benchmarks/results/online_paced-COMMIT.json)")
    options = parser.parse_args(arguments)
    at_commit, found_on = commit(), machine()
    path = options.out or RESULTS / file_name("online_paced", at_commit)
    measured: dict[str, dict[str, float]] = {}
    lost = 0
    with (
        tempfile.TemporaryDirectory(prefix="penstock-paced-") as folder,
        fleet(Path(folder), options.mixed_chunk_tokens, options.slower) as url,
    ):
        for load in (read_loads()[name] for name in options.loads):
            load = replace(load, arrivals_s=load.arrivals_s[: options.most])
            records, duration = uvloop.run(play(url, load, options.slower))
            errors = [record.error for record in records if record.error]
            lost += len(errors)
            for error in dict.fromkeys(errors):
                print(f"failed: {error}", file=sys.stderr)
            measured[load.name] = found = figures(load, records, duration)
            print(f"{load.name}: {found}", flush=True)
            merge(path, found_on, at_commit, {"loads": {load.name: found}, "rates": {load.name: rates(url)}})
    print("\n".join([f"\ncommit {at_commit} (ms)", *table({"paced": measured}, with_peers=True), str(path)]))
    return 1 if lost else 0


@contextlib.contextmanager
def fleet(folder: Path, mixed_chunk_tokens: int, slower: float) -> Iterator[str]:
    """The URL of a router with one worker of each role behind it."""
    model = make_shape_folder(SHAPE, folder)
    common = {"dtype": "float32", "load_format": "dummy", "served_model_name": NAME, "lease_s": LEASE_S}
    common |= {"block_size": PAGE, "kv_cache_memory_bytes": NUM_PAGES * PAGE * TOKEN_BYTES}
    common |= {"mixed_chunk_tokens": mixed_chunk_tokens, "max_num_batched_tokens": STEP_TOKENS}
    with contextlib.ExitStack() as stack:
        redis = RedisServer(folder)
        redis.start()
        stack.callback(redis.stop)
        before = os.environ.get(PACE_ENV)
        for role, pace in PACES.items():
            os.environ[PACE_ENV] = json.dumps(asdict(pace.slower(slower)))
            started = workers(redis.url, model, {f"{role}-0": role}, module="benchmarks.paced_worker", **common)
            stack.enter_context(started)
        if before is None:
            del os.environ[PACE_ENV]
        url = stack.enter_context(router(redis.url, model, lease_s=LEASE_S, served_model_name=NAME))
        while len(fleet_of(url)["workers"]) < len(PACES):
            time.sleep(0.1)
        yield url


async def play(url: str, load: Load, slower: float) -> tuple[list[RequestRecord], float]:
    """The load so many times as slow; what it took without that."""
    fields = {"model": NAME, "temperature": 0.0, "ignore_eos": True}
    async with connect(url, headers={"X-Penstock-Timeline": "1"}) as client:
        times = [at_s * slower for at_s in load.arrivals_s]
        records, duration = await run(client, fields, load.questions(SHAPE.vocab), times)
    return [at_full_speed(record, slower) for record in records], duration / slower


def at_full_speed(record: RequestRecord, slower: float) -> RequestRecord:
    """What a client would have seen of a fleet that is not slowed down; its timeline stays as it was, but for times."""
    spans = [
        {key: value / slower if key in ("ms", "exposed_ms") else value for key, value in span.items()}
        for span in record.timeline or ()
    ]
    return replace(
        record,
        start=record.start / slower,
        ttft=record.ttft / slower,
        latency=record.latency / slower,
        itl=[gap / slower for gap in record.itl],
        timeline=spans,
    )


def rates(url: str) -> dict[str, dict[str, float]]:
    """What each worker has measured of itself, by name."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
        return rates_by_worker(answer.read().decode())


if __name__ == "__main__":
    sys.exit(main())
