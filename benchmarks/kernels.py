"""Each kernel's share of the card's memory bandwidth or arithmetic, at the shapes that the engine runs.

    python benchmarks/kernels.py                                     # everything
    python benchmarks/kernels.py --only 'decode_attention*' '* b64 c4096' --models llama8b
    python benchmarks/kernels.py --list

A case's calls are captured in a CUDA graph and replayed between two events; the median of several replays counts. Calls
take turns on copies of their memory, so that the level-2 cache does not serve what memory should. `floor` is the longer
of bytes over 4.30 TB/s and operations over 787 TFLOP/s (what an H200 does at best); `share` is floor over time, and
`of this` the same against the rates that this run measured. Rows go into benchmarks/results/kernels-COMMIT.json.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

import torch

from benchmarks.kernel_cases import FULL, Call, Case, Place, all_cases
from benchmarks.record import RESULTS, commit, file_name, machine, merge
from benchmarks.shapes import H200, SHAPES, Card

CACHE_BYTES = 64 << 20  # at least a Hopper card's level-2 cache
MAX_COPIES = 64
GRAPH_MS = 5.0  # about so long is a graph
MAX_CALLS = 512  # in a graph


def copies_of(case: Case) -> int:
    """Copies of a case's memory, so that four caches' worth lies between two uses of one."""
    return max(1, min(MAX_COPIES, -(-4 * CACHE_BYTES // case.size_bytes)))


def time_us(calls: Sequence[Call], repeats: int) -> float:
    """Median time of a call on the device, in microseconds."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    once_ms = max(1e-3, begin.elapsed_time(end))
    rounds = max(1, min(MAX_CALLS // len(calls), round(GRAPH_MS / once_ms)))
    replay = _captured(calls, rounds)
    replay()
    found: list[float] = []
    for _ in range(repeats):
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(found)


def _captured(calls: Sequence[Call], rounds: int) -> Callable[[], None]:
    """All calls, `rounds` times, as one graph; launched one by one where something in them cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in [*calls] * rounds:
                call()
    except RuntimeError as error:
        print(f"not captured, so launches count too: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.synchronize()

        def launch() -> None:
            for _ in range(rounds):
                for call in calls:
                    call()

        return launch
    return graph.replay


def measured_card(repeats: int) -> Card:
    """This card's copy rate (1 GiB there and back) and bfloat16 product rate (8192 cubed, random data)."""
    source = torch.empty(1 << 28, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    # By a kernel: in a graph `copy_` goes to a copy engine, which reached 2.77 TB/s on an H200 where kernels reach 4.3.
    copy_us = time_us([lambda: torch.bitwise_not(source, out=target)], repeats)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_us = time_us([lambda: a @ b], repeats)
    return Card(bytes_s=2 * source.nbytes / copy_us * 1e6, flops=2 * 8192**3 / product_us * 1e6)


def row(case: Case, took_us: float, card: Card) -> dict[str, Any]:
    """A result: times in microseconds; `bound` is what the floor consists of."""
    floor_us, here_us = (1e6 * max(case.size_bytes / c.bytes_s, case.flops / c.flops) for c in (H200, card))
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "us": round(took_us, 2),
        "bytes": case.size_bytes,
        "flops": case.flops,
        "bound": "memory" if case.size_bytes / H200.bytes_s >= case.flops / H200.flops else "arithmetic",
        "floor_us": round(floor_us, 2),
        "share": round(floor_us / took_us, 3),
        "share_of_this": round(here_us / took_us, 3),
    }


def line(found: dict[str, Any]) -> str:
    """A result for people."""
    rate = (
        f"{found['bytes'] / found['us'] / 1e6:6.2f} TB/s"
        if found["bound"] == "memory"
        else f"{found['flops'] / found['us'] / 1e6:6.0f} TF/s"
    )
    return (
        f"{found['kernel']:<26} {found['shape']:<34} {found['us']:>10.2f} us {rate}  floor {found['floor_us']:>9.2f}"
        f"  share {found['share']:>6.1%}  of this {found['share_of_this']:>6.1%}"
    )


def chosen(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """Cases whose kernel, shape or "kernel shape" matches one of the patterns; the same case twice counts once."""
    found = {
        case.name: case
        for case in cases
        if any(fnmatch.fnmatchcase(text, p) for p in patterns for text in (case.kernel, case.shape, case.name))
    }
    return list(found.values())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=["llama8b", "qwen1b5"], choices=sorted(SHAPES), metavar="NAME")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="kernels, shapes, or both")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/kernels-COMMIT.json)")
    parser.add_argument("--repeats", type=int, default=7, help="replays, of which the median counts")
    parser.add_argument("--list", action="store_true", help="name the cases and leave")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    place = Place(torch.device("cpu" if options.list else "cuda"), torch.bfloat16)
    cases = chosen([case for name in options.models for case in all_cases(SHAPES[name], FULL, place)], options.only)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    at_commit, found_on = commit(), machine()
    path = options.out or RESULTS / file_name("kernels", at_commit)
    card = measured_card(options.repeats)
    rates = {"copy_tb_s": round(card.bytes_s / 1e12, 3), "product_tflop_s": round(card.flops / 1e12, 1)}
    print(f"{found_on['gpu']}: copy {rates['copy_tb_s']} TB/s, 8192^3 bf16 product {rates['product_tflop_s']} TFLOP/s")
    rows: dict[str, Any] = {}
    failed = 0
    with torch.inference_mode():
        for case in cases:
            torch.cuda.empty_cache()
            try:
                found = row(case, time_us(case.build(copies_of(case)), options.repeats), card)
            except Exception:  # the other kernels are still worth having
                failed += 1
                print(f"{case.name} failed:\n{traceback.format_exc(limit=-3)}", flush=True)
                torch.cuda.synchronize()
                continue
            rows[case.name] = found
            print(line(found), flush=True)
            if len(rows) % 20 == 0:
                merge(path, found_on, at_commit, {"rates": rates, "rows": rows})
    merge(path, found_on, at_commit, {"rates": rates, "rows": rows})
    print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
