"""`penstock top`: a fleet in the terminal, renewed every second from a router's `GET /fleet`.

`render` is pure: two answers in, lines out; the rest asks the router and paints.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.ask_fleet import ask_fleet
from penstock.client_options import ClientParser, api_key, number, server_url
from penstock.common.bounds import LONGEST_S
from penstock.common.errors import ConfigError

_CLEAR = "\x1b[H\x1b[J"
_HEAD = ("WORKER", "ROLE", "RUN", "WAIT", "QUEUED", "PAGES", "HELD", "HITS", "PROMPT/S", "OUT/S", "MOVED/S", "STATE")


def main(arguments: Sequence[str]) -> int:
    """Show the fleet until Ctrl-C, or --once; 1 if the router cannot be asked."""
    parser = ClientParser("penstock top", "A fleet in the terminal.")
    parser.add_argument("--url", type=server_url, default="http://127.0.0.1:8000", help="a router of the fleet")
    parser.add_argument("--api-key", default=api_key(os.environ), help="if the router wants one")
    seconds = number(0.01, LONGEST_S)
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="SECONDS", help="between two looks")
    parser.add_argument("--once", action="store_true", help="two looks, one picture, and leave")
    options = parser.parse(arguments, os.environ)
    before: Mapping[str, Any] | None = None
    try:
        while True:
            found = ask_fleet(options.url, options.api_key)
            if before is not None or not options.once:
                if not options.once:
                    print(_CLEAR, end="")
                print("\n".join(render(found, before)), flush=True)
            if options.once and before is not None:
                return 0
            before = found
            time.sleep(options.interval)
    except KeyboardInterrupt:
        return 0
    except ConfigError as error:
        print(f"penstock top: {error}", file=sys.stderr)
        return 1


def render(found: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    """The picture of an answer; rates need an earlier one, and are "-" for workers that it does not have."""
    seconds = found["time_s"] - before["time_s"] if before else 0.0
    earlier = {worker["incarnation"]: worker["totals"] for worker in before["workers"]} if before else {}
    rows = [_HEAD, *(_row(worker, earlier.get(worker["incarnation"]), seconds) for worker in found["workers"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, 1, len(_HEAD) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    router = found["router"]
    summary = ", ".join(
        f"{router.get(name, 0)} {words}"
        for name, words in (
            ("in_flight", "in flight"),
            ("finished", "finished"),
            ("failed", "failed"),
            ("retries", "moved to another worker"),
            ("workers_lost", "workers lost"),
            ("queued", "waiting for room"),
        )
    )
    pairs = [
        f"hand-offs from {pair['prefill']} to {pair['decode']} fail; next try in {pair['retry_in_s']:.0f} s"
        for pair in found["broken_pairs"]
    ]
    return [f"{', '.join(found['models'])}: {summary}", *lines, *pairs]


def _row(worker: Mapping[str, Any], earlier: Mapping[str, int] | None, seconds: float) -> tuple[str, ...]:
    pages, totals = worker["pages"], worker["totals"]
    queries = totals["prefix_queries"]

    def rate(name: str) -> float | None:
        return (totals[name] - earlier[name]) / seconds if earlier is not None and seconds > 0 else None

    moved = rate("transfer_bytes")
    return (
        worker["worker_id"],
        worker["role"],
        str(worker["running"]),
        str(worker["waiting"]),
        str(worker["queued_tokens"]),
        f"{pages['held']}/{pages['total']}",
        f"{100 * pages['held'] // max(1, pages['total'])} %",
        f"{100 * totals['prefix_hits'] // queries} %" if queries else "-",
        _whole(rate("prompt_tokens")),
        _whole(rate("generation_tokens")),
        "-" if moved is None else f"{moved / 2**20:.1f} MiB",
        "" if worker["state"] == "up" else ": ".join(filter(None, (worker["state"], worker["reason"]))),
    )


def _whole(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}"
