"""The table and plots of docs/routing.md: every routing policy on public traces, simulated.

    python benchmarks/routing.py TRACES [--only GROUP ...]
    python benchmarks/routing.py TRACES --bounds    # prints what balance is possible at all

TRACES is a folder with Mooncake's FAST'25 traces (mooncake_conversation_trace.jsonl, mooncake_synthetic_trace.jsonl)
and the Azure 2023 ones (azure2023_code.csv, azure2023_conv.csv). Writes benchmarks/results/routing-<commit>.json (the
groups asked for replace those of the same commit), docs/routing-*.png, and the tables between the markers of
docs/routing.md. Takes ten minutes on one core; the figures do not depend on the machine, all but `us_per_request`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks.record import RESULTS, ROOT, commit, file_name, machine, merge
from penstock.common.config import ROUTING_POLICIES
from penstock.simulate.plot import draw
from penstock.simulate.result import PolicyResult, Slo
from penstock.simulate.runs import balance_bounds, compare, scaled
from penstock.simulate.simulator import FleetShape
from penstock.simulate.trace import read_trace, repeated

UTILISATION = 0.7
FETCH = "cost, fetch"  # the cost policy where workers can read prefixes from each other
ALL = (*ROUTING_POLICIES, FETCH)
HIT_MARK, BALANCE_MARK = 0.85, 1.05
TRACES = {
    "conversation": "mooncake_conversation_trace.jsonl",
    "synthetic": "mooncake_synthetic_trace.jsonl",
    "azure code": "azure2023_code.csv",
    "azure conv": "azure2023_conv.csv",
}
DOCUMENT = ROOT / "docs" / "routing.md"


@dataclass(frozen=True)
class Row:
    """One fleet on one trace."""

    trace: str
    workers: int
    pages: int
    repeat: int = 1
    policies: tuple[str, ...] = ALL

    @property
    def name(self) -> str:
        times = f" x{self.repeat}" if self.repeat > 1 else ""
        return f"{self.trace}{times}, {self.workers} x {self.pages}"


_MOONCAKE, _PAGES = ("conversation", "synthetic"), (1000, 6000, 20000)
GROUPS: dict[str, list[Row]] = {
    "mooncake": [Row(trace, workers, pages) for trace in _MOONCAKE for workers in (8, 64) for pages in _PAGES],
    "repeated": [Row(trace, 64, pages, 8, ("least-load", FETCH)) for trace in _MOONCAKE for pages in _PAGES[:2]],
    "large": [Row(trace, 512, 6000) for trace in _MOONCAKE],
    "azure": [Row(trace, workers, 6000) for trace in ("azure code", "azure conv") for workers in (8, 64)],
}


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """All policies of a row: a result each, and what greedy balancing comes to."""
    shape = FleetShape(row.workers, row.pages)
    requests = repeated(read_trace(str(folder / TRACES[row.trace]), shape.page_tokens), row.repeat)
    requests = scaled(requests, shape, UTILISATION)
    found: dict[str, Any] = {"greedy_balance": round(balance_bounds(requests, shape).known, 4)}
    for name in row.policies:
        began = time.process_time()
        (result,) = compare(requests, shape, [name.partition(",")[0]], Slo(), fetch=name == FETCH)
        us_per_request = (time.process_time() - began) * 1e6 / len(requests)
        found[name] = asdict(replace(result, policy=name)) | {"us_per_request": round(us_per_request)}
        print(f"{row.name:32} {name:15}", *(f"{key}={found[name][key]:.4g}" for key in _SHOWN), flush=True)
    return found


_SHOWN = ("hit_ratio", "oracle_hit_ratio", "max_over_mean_load", "ttft_p50_ms", "ttft_p99_ms", "itl_p99_ms", "goodput")


def results_of(found: Mapping[str, Any]) -> list[PolicyResult]:
    """The results of one row as they were recorded."""
    fields = PolicyResult.__dataclass_fields__
    return [
        PolicyResult(**{key: value for key, value in result.items() if key in fields})
        for result in found.values()
        if isinstance(result, dict)
    ]


def marks(found: Mapping[str, Any]) -> tuple[float, float, float]:
    """(hits over the oracle's, max/mean load, p99 over the best other policy's) of the cost policy with reading."""
    mine = found[FETCH]
    others = [result.ttft_p99_ms for result in results_of(found) if result.policy not in (FETCH, "cost")]
    hits = mine["hit_ratio"] / mine["oracle_hit_ratio"] if mine["oracle_hit_ratio"] else 1.0
    return hits, mine["max_over_mean_load"], mine["ttft_p99_ms"] / min(others)


def marks_table(rows: Mapping[str, Any]) -> Iterable[str]:
    """Lines of Markdown: the marks, row by row; what misses one is bold."""
    yield "| fleet | hits / oracle's | max/mean load | greedy | p99 TTFT / best other |"
    yield "|---|---|---|---|---|"
    for name, found in rows.items():
        hits, balance, late = marks(found)
        cells = [
            _bold(f"{hits:.3f}", hits < HIT_MARK),
            _bold(f"{balance:.3f}", balance > BALANCE_MARK),
            f"{found['greedy_balance']:.3f}",
            _bold(f"{late:.3f}", late > 1.0),
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def bounds_table(folder: Path) -> Iterable[str]:
    """Lines of Markdown: the balance that is possible on the Mooncake traces, however many pages workers have."""
    yield "| fleet | all known beforehand | each known when it comes | outputs guessed |"
    yield "|---|---|---|---|"
    for trace in _MOONCAKE:
        for workers in (8, 64):
            shape = FleetShape(workers, 6000)
            requests = read_trace(str(folder / TRACES[trace]), shape.page_tokens)
            found = balance_bounds(scaled(requests, shape, UTILISATION), shape)
            yield f"| {trace}, {workers} | {found.foreseen:.3f} | {found.known:.3f} | {found.guessed:.3f} |"


def policies_table(rows: Mapping[str, Any]) -> Iterable[str]:
    """Lines of Markdown: each policy of each row."""
    yield "| fleet | policy | hits (oracle's) | max/mean | TTFT p50 / p99, ms | ITL p99, ms | in SLOs |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in rows.items():
        for result in results_of(found):
            yield (
                f"| {name} | {result.policy} | {result.hit_ratio:.3f} ({result.oracle_hit_ratio:.3f}) "
                f"| {result.max_over_mean_load:.2f} | {result.ttft_p50_ms:.0f} / {result.ttft_p99_ms:.0f} "
                f"| {result.itl_p99_ms:.0f} | {100 * result.slo_attainment:.1f} % |"
            )


def _bold(text: str, missed: bool) -> str:
    return f"**{text}**" if missed else text


def write_document(groups: Mapping[str, Any]) -> None:
    """Put the tables between their markers."""
    text = DOCUMENT.read_text()
    tables = {f"{name} marks": marks_table(rows) for name, rows in groups.items() if name in GROUPS}
    tables |= {name: policies_table(rows) for name, rows in groups.items() if name in GROUPS}
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        body = "\n".join([begin, *lines, end])
        text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, body=body: body, text, flags=re.DOTALL)
    DOCUMENT.write_text(text)


def draw_plots(rows: Mapping[str, Any]) -> None:
    """One picture a trace."""
    for trace in _MOONCAKE:
        groups = {name.partition(", ")[2]: results_of(found) for name, found in rows.items() if name.startswith(trace)}
        if groups:
            draw(groups, ROOT / "docs" / f"routing-{trace}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--bounds", action="store_true")
    flags = parser.parse_args()
    if flags.bounds:
        print("\n".join(bounds_table(flags.traces)))
        return
    at_commit = commit()
    path = RESULTS / file_name("routing", at_commit)
    for group in flags.only:
        rows = {row.name: measure(row, flags.traces) for row in GROUPS[group]}
        merge(path, machine(), at_commit, {group: rows})
    record = json.loads(path.read_text())
    write_document(record)
    draw_plots(record.get("mooncake", {}))


if __name__ == "__main__":
    main()
