"""The loads of online.py, what they ask, and what is made of the answers. Pure but for the files of loads and peers."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.record import ROOT
from penstock.bench.questions import Question
from penstock.bench.serving_metrics import RequestRecord, percentile

LOADS = [ROOT / "benchmarks" / "workloads" / name for name in ("online.json", "online_mixed.json")]
PEERS = ROOT / "benchmarks" / "peers"
TOKEN_IDS = (10, 100000)  # prompts are drawn from these
# What a request must keep to count for goodput, beside its load's time to first token.
TPOT_MS, GAP_MS = 25.0, 100.0
SHRUNK_REQUESTS, SHRUNK_BY = 12, 32  # of a load on a CPU
FLEET_NAMES = {  # by key of the result file
    "loads": "1 + 1",
    "one_phase": "two one-phase",
    "handed_off": "simulated, all handed off",
    "balanced": "simulated",
    "paced": "1 + 1, paced",
}
_COLUMNS = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "itl_max", "out_tok_s", "goodput")


@dataclass(frozen=True)
class Load:
    """Requests at given times (seconds), whatever becomes of those before: of equal length, or of one of `mix` each."""

    name: str
    input_tokens: int  # of the longest prompt
    output_tokens: int
    prompt_seed: int
    slo_ttft_ms: float
    arrivals_s: tuple[float, ...]
    mix: tuple[int, ...] = ()

    def questions(self, vocab_size: int) -> list[Question]:
        """Its prompts: `prompt_seed` says which, one token after another."""
        chooser, (low, high) = random.Random(self.prompt_seed), TOKEN_IDS
        high = min(high, vocab_size)
        lengths = [chooser.choice(self.mix) if self.mix else self.input_tokens for _ in self.arrivals_s]
        return [
            Question([chooser.randrange(low, high) for _ in range(length)], length, self.output_tokens)
            for length in lengths
        ]

    def shrunk(self) -> Load:
        """A few of its requests, with short prompts: for a tiny model on a CPU."""
        lengths = {
            "input_tokens": self.input_tokens // SHRUNK_BY,
            "output_tokens": max(2, self.output_tokens // SHRUNK_BY),
            "mix": tuple(length // SHRUNK_BY for length in self.mix),
        }
        return replace(self, **lengths, arrivals_s=self.arrivals_s[:SHRUNK_REQUESTS])


def read_loads() -> dict[str, Load]:
    """Every load, by its name: W1@8."""
    return {name: _load(name, values) for path in LOADS for name, values in json.loads(path.read_text()).items()}


def _load(name: str, values: dict[str, Any]) -> Load:
    lengths, times = values["input_tokens"], tuple(values["arrivals_s"])
    mix = tuple(lengths) if isinstance(lengths, list) else ()
    same = {key: values[key] for key in ("output_tokens", "prompt_seed", "slo_ttft_ms")}
    return Load(name, max(mix) if mix else lengths, **same, arrivals_s=times, mix=mix)


def figures(load: Load, records: Sequence[RequestRecord], duration: float) -> dict[str, float]:
    """A load's result. Milliseconds, output tokens a second, and shares of all its requests.

    `goodput` is the share that kept the objectives, `handed_off` the share whose pages another worker computed, and
    `exposed_share_p99` how much of a request's time its transfer cost the client at most, of 99 in 100.
    """
    done = [record for record in records if not record.error]
    tpots = [record.tpot for record in done if record.output_len > 1]
    gaps = [gap for record in done for gap in record.itl]
    transfers = [(_transfer(record), record.latency) for record in done]
    moved = [(span["exposed_ms"] / 1e3 / latency) for span, latency in transfers if span]
    found: dict[str, float] = {"n": len(records), "ok": len(done)}
    for name, seconds, percentages in (
        ("ttft", [record.ttft for record in done], (50, 99)),
        ("itl", gaps, (50, 99, 100)),
        ("tpot", tpots, (50, 99)),
        ("e2e", [record.latency for record in done], (50, 99)),
    ):
        for percentage in percentages:
            key = f"{name}_max" if percentage == 100 else f"{name}_p{percentage}"
            found[key] = round(percentile(seconds, percentage) * 1e3, 2)
    found["out_tok_s"] = round(sum(record.output_len for record in done) / duration, 2)
    found["goodput"] = round(sum(_good(record, load.slo_ttft_ms) for record in done) / len(records), 3)
    found["handed_off"] = round(len(moved) / max(1, len(done)), 3)
    found["exposed_share_p99"] = round(percentile(moved, 99), 4)
    return found


def hand_off_figures(records: Sequence[RequestRecord]) -> dict[str, float]:
    """What a hand-off costs a request that is alone: ms from first to second token, of a later gap, and the rest."""
    firsts, others = [record.itl[0] for record in records], [gap for record in records for gap in record.itl[1:]]
    spans = [span for span in map(_transfer, records) if span]
    first, step = statistics.median(firsts) * 1e3, statistics.median(others) * 1e3
    return {
        "n": len(records),
        "ttft_ms": round(statistics.median(record.ttft for record in records) * 1e3, 2),
        "first_gap_ms": round(first, 2),
        "decode_step_ms": round(step, 2),
        "over_a_step_ms": round(first - step, 2),
        "transfer_ms": round(statistics.median(span["ms"] for span in spans), 2) if spans else 0.0,
        "exposed_ms": round(statistics.median(span["exposed_ms"] for span in spans), 2) if spans else 0.0,
        "handed_off": round(len(spans) / len(records), 3),
    }


def table(measured: Mapping[str, Mapping[str, Mapping[str, float]]], *, with_peers: bool) -> list[str]:
    """Ours of each fleet (by key of the result file, then load), and beside it vLLM's, the first mark and the aim."""
    peers = json.loads((PEERS / "vllm-0.22.1-2xh200-online.json").read_text()) if with_peers else {}
    marks = json.loads((PEERS / "marks-2xh200-online.json").read_text()) if with_peers else {}
    loads = list(dict.fromkeys(load for fleet in measured.values() for load in fleet))
    rows: list[tuple[str, ...]] = [("load", "", *_COLUMNS)]
    for load in loads:
        lines: list[tuple[str, Mapping[str, float]]] = [
            (FLEET_NAMES[key], fleet[load]) for key, fleet in measured.items() if load in fleet
        ]
        lines += [(f"vLLM {name}", peers[name][load]) for name in ("A", "Bx") if load in peers.get(name, ())]
        lines += [(name, marks[load][name]) for name in ("first mark", "aim") if load in marks]
        for place, (name, values) in enumerate(lines):
            rows.append(("" if place else load, name, *(_shown(values.get(column)) for column in _COLUMNS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _good(record: RequestRecord, slo_ttft_ms: float) -> bool:
    gap = max(record.itl, default=0.0)
    return record.ttft * 1e3 <= slo_ttft_ms and record.tpot * 1e3 <= TPOT_MS and gap * 1e3 <= GAP_MS


def _transfer(record: RequestRecord) -> dict[str, Any] | None:
    return next((entry for entry in record.timeline or () if entry["name"] == "transfer"), None)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
