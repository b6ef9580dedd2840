"""One prefill and one decode worker under load, beside two one-phase workers: what the clients of a fleet see.

    python benchmarks/online.py                                # two GPUs; every load, both fleets: about ten minutes
    python benchmarks/online.py --loads W1@8 W1@16 --fleets 1+1 --hand-off
    python benchmarks/online.py --cpu --loads W1@8             # a tiny model and short requests: tests this script

Open-loop Poisson loads (workloads/online.json): streamed completions of random token ids at their times, greedy, to the
full length. Figures go into benchmarks/results/online-COMMIT.json as they come: `loads` are those of 1 + 1, `one_phase`
those of the two one-phase workers. A later run at the same commit adds to the file. The keys: benchmarks/README.md.
--requests adds a line of JSON for each request to a file of its own: when it was sent, its first token, gaps, timeline.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks.h200 import engine_options
from benchmarks.online_figures import FLEET_NAMES, Load, figures, hand_off_figures, read_loads, table
from benchmarks.record import RESULTS, commit, file_name, machine, merge
from benchmarks.shape_folder import make_shape_folder
from benchmarks.shapes import SHAPES, Shape
from penstock.bench.client import ask, run_load
from penstock.bench.questions import Question
from penstock.bench.serving_metrics import RequestRecord
from penstock.common.config import ServeConfig
from penstock.fleet import Fleet
from penstock.http_client import Client, connect

FLEETS: dict[str, dict[str, Any]] = {
    "1+1": {"prefill_workers": 1, "decode_workers": 1, "prefill_devices": ("0",), "decode_devices": ("1",)},
    "one-phase": {"decode_workers": 2, "decode_devices": ("0", "1")},
}
KEYS = {"1+1": "loads", "one-phase": "one_phase"}
TABLE = ("W1@8", "W1@16", "W1@24", "W2@2", "W2@4", "W2@6")
HAND_OFF_TOKENS, HAND_OFF_OUTPUT, HAND_OFF_REPEATS = (2048, 8192, 32000), 32, 5
ON_GPU = {"max_model_len": 32768, "max_num_seqs": 256}
ON_CPU = {"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 16 << 20, "block_size": 16, "cpu_threads": 1}
_CPU_PLACES = {"prefill_devices": (), "decode_devices": ()}
WARM_UP = 4  # requests of each length a worker
NAME = "bench"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--loads", nargs="*", default=list(TABLE), choices=list(read_loads()), metavar="NAME")
    parser.add_argument("--fleets", nargs="+", default=list(FLEETS), choices=list(FLEETS), metavar="FLEET")
    parser.add_argument("--hand-off", action="store_true", help="also requests that are alone, 2k to 32k tokens long")
    parser.add_argument("--model", default="llama8b", choices=sorted(SHAPES))
    parser.add_argument("--serve-option", nargs="+", default=[], metavar="NAME=VALUE", help="options of penstock serve")
    parser.add_argument("--requests", type=Path, metavar="FILE", help="what became of each request, a line for each")
    parser.add_argument("--out", "--append", type=Path, help="result file (benchmarks/results/online-COMMIT.json)")
    parser.add_argument("--cpu", action="store_true", help="a tiny model, few and short requests")
    options = parser.parse_args(arguments)
    try:
        options.serve = engine_options(options.serve_option)
    except ValueError as error:
        parser.error(str(error).replace("--engine-option", "--serve-option"))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a request got no answer."""
    options = parse(arguments)
    if options.requests:
        options.requests.touch()  # here and not after the first load it is told that this cannot be
    shape = SHAPES["tiny" if options.cpu else options.model]
    loads = [load.shrunk() if options.cpu else load for name, load in read_loads().items() if name in options.loads]
    at_commit, found_on = commit(), machine()
    path = options.out or RESULTS / file_name("online", at_commit)
    measured: dict[str, dict[str, dict[str, float]]] = {}
    lost = 0
    with tempfile.TemporaryDirectory(prefix="penstock-online-") as folder:
        make_shape_folder(shape, Path(folder))
        for name in options.fleets:

            def take(group: str, key: str, found: dict[str, float], errors: Sequence[str]) -> None:
                nonlocal lost
                lost += len(errors)
                for error in dict.fromkeys(errors):
                    print(f"failed: {error}", file=sys.stderr, flush=True)
                print(f"{group} {key}: {found}", flush=True)
                merge(path, found_on, at_commit, {group: {key: found}})
                if group in FLEET_NAMES:
                    measured.setdefault(group, {})[key] = found

            config = serve_config(folder, FLEETS[name], options)
            print(f"== {name}", flush=True)
            with Fleet(config) as fleet:
                uvloop.run(measure(fleet.url, loads, shape, KEYS[name], options, take))
    print(
        "\n".join(
            [
                f"\n{shape.name}, {found_on['gpu']}, commit {at_commit} (ms)",
                *table(measured, with_peers=not options.cpu),
                str(path),
            ]
        )
    )
    return 1 if lost else 0


def serve_config(folder: str, fleet: dict[str, Any], options: argparse.Namespace) -> ServeConfig:
    """The options of a fleet, by what `penstock serve` calls them."""
    values = {"load_format": "dummy", "served_model_name": (NAME,), "port": 0, "log_level": "warning", **fleet}
    values |= {**ON_CPU, **_CPU_PLACES} if options.cpu else ON_GPU
    return ServeConfig(model=folder, **values | options.serve)


Take = Callable[[str, str, dict[str, float], Sequence[str]], None]


async def measure(
    url: str, loads: Sequence[Load], shape: Shape, group: str, options: argparse.Namespace, take: Take
) -> None:
    """Every load, one after the other; `take` gets (group, load, figures, errors)."""
    fields = {"model": NAME, "temperature": 0.0, "ignore_eos": True}
    async with connect(url, headers={"X-Penstock-Timeline": "1"}) as client:
        await warm_up(client, fields, loads, shape)
        for load in loads:
            records, duration = await run(client, fields, load.questions(shape.vocab), load.arrivals_s)
            take(group, load.name, figures(load, records, duration), [r.error for r in records if r.error])
            if options.requests:
                write_requests(options.requests, f"{group} {load.name}", records)
        if options.hand_off and group == "loads":
            shrink = 32 if options.cpu else 1
            for tokens in HAND_OFF_TOKENS:
                alone = Load("", tokens // shrink, HAND_OFF_OUTPUT, tokens, 0.0, (0.0,) * HAND_OFF_REPEATS)
                records = []
                for question in alone.questions(shape.vocab):
                    records += (await run(client, fields, [question], [0.0]))[0]
                done = [record for record in records if not record.error]
                errors = [record.error for record in records if record.error]
                take("hand_off", str(tokens // shrink), hand_off_figures(done) if done else {"n": 0}, errors)


def write_requests(path: Path, load: str, records: Sequence[RequestRecord]) -> None:
    """Add a line for each; milliseconds, `sent_ms` since the first was sent."""
    first = min(record.start for record in records)
    with path.open("a") as file:
        for record in records:
            line: dict[str, Any] = {"load": load, "sent_ms": ms(record.start - first), "ttft_ms": ms(record.ttft)}
            line |= {"e2e_ms": ms(record.latency), "itl_ms": [ms(gap) for gap in record.itl], "error": record.error}
            file.write(json.dumps(line | {"timeline": record.timeline}) + "\n")


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


async def warm_up(client: Client, fields: dict[str, Any], loads: Sequence[Load], shape: Shape) -> None:
    """Some requests of every length that comes, which no load asks again."""
    for load in {(load.input_tokens, load.output_tokens): load for load in loads}.values():
        other = Load("", load.input_tokens, load.output_tokens, load.prompt_seed + 1, 0.0, (0.0,) * (2 * WARM_UP))
        records, _ = await run(client, fields, other.questions(shape.vocab), other.arrivals_s)
        for record in records:
            if record.error:
                raise SystemExit(f"a warm-up request failed: {record.error}")


async def run(
    client: Client, fields: dict[str, Any], questions: Sequence[Question], times: Sequence[float]
) -> tuple[list[RequestRecord], float]:
    """Send all at their times; the collector's pauses of this process are not the server's."""

    async def send(number: int, question: Question) -> RequestRecord:
        return await ask(client, "/v1/completions", "openai", fields, question, f"online-{number}")

    gc.collect()
    gc.disable()
    try:
        return await run_load(questions, times, send)
    finally:
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
