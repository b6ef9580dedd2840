"""The tables and plots of docs/routing.md and all of docs/routing-tables.md: every policy on public traces, simulated.

    python benchmarks/routing.py TRACES [--only GROUP ...]

TRACES is a folder with Mooncake's FAST'25 traces (mooncake_conversation_trace.jsonl, mooncake_synthetic_trace.jsonl)
and the Azure 2023 ones (azure2023_code.csv, azure2023_conv.csv). Writes benchmarks/results/routing-<commit>.json (the
groups asked for replace those of the same commit) and, once that has all groups, the documents and docs/routing-*.png.
Takes a quarter of an hour on one core; the figures do not depend on the machine, all but `us_per_request`.
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
from penstock.router.cost import DEFAULT_WEIGHTS, CostPolicy
from penstock.router.policies import make_policy
from penstock.simulate.plot import draw
from penstock.simulate.result import PolicyResult, Slo, with_oracle
from penstock.simulate.runs import balance_bounds, oracle_ratio, scaled
from penstock.simulate.simulator import FleetShape, Simulator
from penstock.simulate.trace import TracedRequest, read_trace, repeated

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
DOCUMENT, TABLES = ROOT / "docs" / "routing.md", ROOT / "docs" / "routing-tables.md"


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
    "million": [Row("generated:1000000", 1000, 2000, policies=(FETCH,))],
}
HEADINGS = {  # of docs/routing-tables.md
    "mooncake": "Mooncake's traces",
    "repeated": "The same, played eight times",
    "large": "512 workers",
    "azure": "The Azure traces, which have no prefixes",
    "million": "A million generated requests",
    "weights": "Weights of the cost policy",
}
# Weight of the cost policy -> what is tried, and where.
WEIGHTS: dict[str, tuple[tuple[float, ...], tuple[Row, ...]]] = {
    "evict": ((4.0, 5.0, 6.0, 8.0, 10.0), (Row("synthetic", 8, 1000),)),
    "share": ((0.1, 0.3, 1.0, 3.0), (Row("conversation", 64, 6000), Row("synthetic", 64, 6000))),
    "decode": ((0.01, 0.05, 0.2), (Row("conversation", 64, 6000),)),
}


def requests_of(row: Row, shape: FleetShape, folder: Path) -> list[TracedRequest]:
    """The trace, its arrivals stretched to the utilisation."""
    file = TRACES.get(row.trace)
    requests = read_trace(str(folder / file) if file else row.trace, shape.page_tokens)
    return scaled(repeated(requests, row.repeat), shape, UTILISATION)


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """All policies of a row: a result each, and what balance was possible with the hits of the last one."""
    shape = FleetShape(row.workers, row.pages)
    requests = requests_of(row, shape, folder)
    oracle = oracle_ratio(requests, shape)
    found: dict[str, Any] = {}
    for name in row.policies:
        began = time.process_time()
        simulator = Simulator(shape, make_policy(name.partition(",")[0], 0, name == FETCH))
        result = with_oracle(simulator.run(requests, Slo()), oracle)
        us_per_request = (time.process_time() - began) * 1e6 / len(requests)
        found[name] = asdict(replace(result, policy=name)) | {"us_per_request": round(us_per_request)}
        show(row.name, found[name])
    return found | {"balance": asdict(balance_bounds(requests, simulator.computed(), shape))}


def measure_weights(folder: Path) -> dict[str, Any]:
    """Weight -> the cost policy's results with other values of it, the other weights as they are."""
    found: dict[str, Any] = {}
    for weight, (values, rows) in WEIGHTS.items():
        for row in rows:
            shape = FleetShape(row.workers, row.pages)
            requests = requests_of(row, shape, folder)
            oracle = oracle_ratio(requests, shape)
            for name in ("cost", FETCH):
                for value in values:
                    policy = CostPolicy(fetch=name == FETCH, weights=replace(DEFAULT_WEIGHTS, **{weight: value}))
                    result = with_oracle(Simulator(shape, policy).run(requests, Slo()), oracle)
                    tried = {"fleet": row.name, "value": value} | asdict(replace(result, policy=name))
                    found.setdefault(weight, []).append(tried)
                    show(f"{row.name}, {weight} {value:g}", tried)
    return found


def show(name: str, result: Mapping[str, Any]) -> None:
    print(f"{name:36} {result['policy']:15}", *(f"{key}={result[key]:.4g}" for key in _SHOWN), flush=True)


_SHOWN = ("hit_ratio", "oracle_hit_ratio", "max_over_mean_load", "ttft_p50_ms", "ttft_p99_ms", "itl_p99_ms", "goodput")


def results_of(found: Mapping[str, Any]) -> list[PolicyResult]:
    """The results of one row as they were recorded."""
    fields = PolicyResult.__dataclass_fields__
    return [
        PolicyResult(**{key: value for key, value in result.items() if key in fields})
        for result in found.values()
        if isinstance(result, dict) and "policy" in result
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
            f"{found['balance']['known']:.3f}",
            _bold(f"{late:.3f}", late > 1.0),
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def bounds_table(rows: Mapping[str, Any]) -> Iterable[str]:
    """Lines of Markdown: the balance that is possible, and the cost policy's."""
    yield "| fleet | all known beforehand | each known when it comes | outputs guessed | `cost, fetch` |"
    yield "|---|---|---|---|---|"
    for name, found in rows.items():
        cells = [*found["balance"].values(), found[FETCH]["max_over_mean_load"]]
        yield f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |"


def weights_table(weights: Mapping[str, Any]) -> Iterable[str]:
    """Lines of Markdown: what was tried of each weight; the one in use is bold."""
    yield "| weight | fleet | policy | value | hits / oracle's | max/mean | TTFT p50 / p99, ms |"
    yield "|---|---|---|---|---|---|---|"
    for weight, results in weights.items():
        for result in results:
            chosen = result["value"] == getattr(DEFAULT_WEIGHTS, weight)
            yield (
                f"| {weight} | {result['fleet']} | {result['policy']} | {_bold(format(result['value'], 'g'), chosen)} "
                f"| {result['hit_ratio'] / result['oracle_hit_ratio']:.3f} | {result['max_over_mean_load']:.3f} "
                f"| {result['ttft_p50_ms']:.0f} / {result['ttft_p99_ms']:.0f} |"
            )


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


def _bold(text: str, told: bool) -> str:
    return f"**{text}**" if told else text


def with_tables(text: str, record: Mapping[str, Any]) -> str:
    """docs/routing.md with the tables between its markers made anew."""
    tables = {f"{name} marks": marks_table(record[name]) for name in ("mooncake", "repeated")} | {
        "bounds": bounds_table({name: found for name, found in record["mooncake"].items() if name.endswith("x 6000")})
    }
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        body = "\n".join([begin, *lines, end])
        text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def all_tables(record: Mapping[str, Any], source: str) -> str:
    """docs/routing-tables.md, whole; `source` is the file with the record."""
    parts = [
        "# Routing policies: all figures",
        f"Written by `python benchmarks/routing.py TRACES` from [{source}](../benchmarks/results/{source}); what the "
        "columns mean and\nwhat follows from them is in [routing](routing.md).",
    ]
    for name, heading in HEADINGS.items():
        parts.append(f"## {heading}")
        if name == "large":  # those of the others are in docs/routing.md, or say nothing
            parts.append("\n".join(marks_table(record[name])))
        parts.append("\n".join(weights_table(record[name]) if name == "weights" else policies_table(record[name])))
    return "\n\n".join(parts) + "\n"


def draw_plots(rows: Mapping[str, Any]) -> None:
    """One picture a trace."""
    for trace in _MOONCAKE:
        groups = {name.partition(", ")[2]: results_of(found) for name, found in rows.items() if name.startswith(trace)}
        if groups:
            draw(groups, ROOT / "docs" / f"routing-{trace}.png")


def main() -> None:
    groups = (*GROUPS, "weights")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, metavar="GROUP")
    flags = parser.parse_args()
    at_commit = commit()
    path = RESULTS / file_name("routing", at_commit)
    for group in flags.only:
        if group == "weights":
            found = measure_weights(flags.traces)
        else:
            found = {row.name: measure(row, flags.traces) for row in GROUPS[group]}
        merge(path, machine(), at_commit, {group: found})
    record = json.loads(path.read_text())
    if record.keys() >= set(groups):
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), record))
        TABLES.write_text(all_tables(record, path.name))
        draw_plots(record["mooncake"])


if __name__ == "__main__":
    main()
