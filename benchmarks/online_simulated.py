"""The loads of online.py on a simulated fleet of one prefill and one decode worker: what to expect of two H200.

    python benchmarks/online_simulated.py                       # every load, in seconds; no GPU
    python benchmarks/online_simulated.py --mixed-chunk-tokens 512 --beside 2 --out scratch.json
    python benchmarks/online_simulated.py --draws 40 --beside 1.1 --out scratch.json

Each load is played twice: `balanced` as the cost policy places prompts, `handed_off` with every prompt computed by the
prefill worker. Rates are those that h200.py recorded, a line through two lengths of prompt: a step with a chunk,
and the load's whole prompts, as the simulator knows no prompts that are slower for their length. The link is NVLink as
transfer.py recorded it. Keys as in online.py. With --draws, arrivals are drawn anew at the same rates so many times and
figures are means over them: a weight that suits one load's bursts may not suit others.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks.online_figures import GAP_MS, TPOT_MS, Load, read_loads, table
from benchmarks.record import RESULTS, commit, file_name, machine, merge
from penstock.common.config import TWO_PHASE_MIXED_CHUNK_TOKENS
from penstock.router.cost import DEFAULT_WEIGHTS, CostPolicy, CostWeights
from penstock.router.rates import WorkerRates
from penstock.simulate.result import PolicyResult, Slo
from penstock.simulate.simulator import FleetShape, Simulator
from penstock.simulate.trace import TracedRequest

RATES_FROM = RESULTS / "h200-6dff87d.json"
SHORT, LONGER = 128, 512  # recorded prompts, between which a chunk lies
LINK_BYTES_PER_S = 319e9  # 2048 tokens in pages of 64: transfer-20f2bda.json
PAGE_TOKENS, NUM_PAGES = 64, 13_000  # of an 8B model on an H200, with the default flags
TABLE = ("W1@8", "W1@16", "W1@24", "W2@2", "W2@4", "W2@6")


def rates(recorded: Mapping[str, float], prompt_tokens: int, chunk_tokens: int) -> WorkerRates:
    """Rates with which chunks and whole prompts take what was recorded, in milliseconds by name."""
    short_ms, longer_ms = (recorded[f"ttft_{tokens}_ms"] for tokens in (SHORT, LONGER))
    chunk_ms = short_ms + (longer_ms - short_ms) * (chunk_tokens - SHORT) / (LONGER - SHORT)
    token_ms = (recorded[f"ttft_{prompt_tokens}_ms"] - chunk_ms) / (prompt_tokens - chunk_tokens)
    return WorkerRates(
        prefill_tokens_per_s=1e3 / token_ms,
        prefill_step_ms=max(0.0, chunk_ms - chunk_tokens * token_ms),
        link_bytes_per_s=LINK_BYTES_PER_S,
    )


def simulate(load: Load, chunk_tokens: int, weights: CostWeights) -> PolicyResult:
    """One load with one set of weights."""
    recorded = json.loads(RATES_FROM.read_text())["llama8b"]
    shape = FleetShape(
        workers=2,
        prefill_workers=1,
        pages_per_worker=NUM_PAGES,
        page_tokens=PAGE_TOKENS,
        rates=rates(recorded, load.input_tokens, chunk_tokens),
        mixed_chunk_tokens=chunk_tokens,
    )
    requests = [TracedRequest(at_s * 1e3, load.input_tokens, load.output_tokens) for at_s in load.arrivals_s]
    slo = Slo(load.slo_ttft_ms, TPOT_MS, GAP_MS)
    return Simulator(shape, CostPolicy(weights=weights)).run(requests, slo)


def draws(load: Load, number: int) -> list[Load]:
    """As many Poisson loads with the mean gap of its arrivals; itself if `number` is 0."""
    rate = len(load.arrivals_s) / load.arrivals_s[-1]
    found = []
    for seed in range(number):
        chooser, at_s, arrivals = random.Random(seed), 0.0, []
        for _ in load.arrivals_s:
            at_s += chooser.expovariate(rate)
            arrivals.append(at_s)
        found.append(replace(load, arrivals_s=tuple(arrivals)))
    return found or [load]


def means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of figures with the same keys."""
    return {key: round(statistics.mean(one[key] for one in found), 3) for key in found[0]}


def figures(result: PolicyResult) -> dict[str, float]:
    """A load's result by the keys of online.py."""
    return {
        "n": result.requests,
        "ttft_p50": round(result.ttft_p50_ms, 1),
        "ttft_p99": round(result.ttft_p99_ms, 1),
        "itl_p50": round(result.itl_p50_ms, 2),
        "itl_p99": round(result.itl_p99_ms, 2),
        "out_tok_s": round(result.output_tokens_per_s),
        "goodput": round(result.slo_attainment, 3),
        "handed_off": round(result.handed_off_ratio, 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixed-chunk-tokens", type=int, default=TWO_PHASE_MIXED_CHUNK_TOKENS)
    parser.add_argument("--beside", type=float, default=DEFAULT_WEIGHTS.beside, help="weight of the cost policy")
    parser.add_argument("--draws", type=int, default=0, metavar="N", help="mean of N loads with other arrivals")
    parser.add_argument("--out", type=Path, help="result file (benchmarks/results/online_simulated-COMMIT.json)")
    flags = parser.parse_args(arguments)
    loads = {name: draws(load, flags.draws) for name, load in read_loads().items()}
    chunk_tokens = flags.mixed_chunk_tokens
    found = {
        group: {name: means([figures(simulate(load, chunk_tokens, weights)) for load in loads[name]]) for name in TABLE}
        for group, weights in (
            ("handed_off", CostWeights(beside=math.inf)),
            ("balanced", CostWeights(beside=flags.beside)),
        )
    }
    at_commit = commit()
    path = flags.out or RESULTS / file_name("online_simulated", at_commit)
    if flags.out or not flags.draws:  # what was drawn is not the record of the loads
        merge(path, machine(), at_commit, found)
    print("\n".join(table(found, with_peers=True)))
    print(
        "handed off: " + ", ".join(f"{name} {values['handed_off']:.2f}" for name, values in found["balanced"].items())
    )


if __name__ == "__main__":
    main()
