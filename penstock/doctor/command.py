"""`penstock doctor`: reads the options, gathers, judges, prints a table (or JSON), and answers with the exit status."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from penstock.common.config import FleetConfig, option
from penstock.common.config_loader import load_config
from penstock.doctor.verdicts import Line, Verdict, exit_status, judge

HIDDEN = ("namespace", "cluster_key", "lease_s", "served_model_name", "log_level")
_COLOURS = {Verdict.OK: 32, Verdict.NOTE: 36, Verdict.WARN: 33, Verdict.FAIL: 31}


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(FleetConfig):
    """What the doctor looks at beside the machine."""

    host: str = option("127.0.0.1", "address of the HTTP server")
    port: int = option(8000, "port of the HTTP server")
    bus_host: str = option("127.0.0.1", "address a worker would bind")
    bus_port: int = option(0, "port of a worker's bus socket; 0: any")
    links: bool = option(True, "measure the transports between the devices")
    json: bool = option(False, "print JSON")


def run(arguments: Sequence[str]) -> int:
    """Examine this machine; 0: all well, 1: something will not work.

    Raises:
        ConfigError: an option that is unknown or out of range.
    """
    config = load_config(
        DoctorConfig,
        arguments,
        os.environ,
        prog="penstock doctor",
        description="Check this machine: software, devices, links, Redis, ports and limits.",
        hidden=HIDDEN,
    )
    from penstock.doctor.probes import gather

    facts = gather(
        redis_url=config.redis_url,
        namespace=config.namespace,
        http=(config.host, config.port),
        bus=(config.bus_host, config.bus_port),
        cluster_key=config.cluster_key,
        measure_links=config.links,
        environ=os.environ,
        tell=_tell,
    )
    _tell("")
    lines = judge(facts)
    if config.json:
        print(
            json.dumps(
                {"lines": [asdict(line) | {"verdict": line.verdict.value} for line in lines], "facts": asdict(facts)}
            )
        )
    else:
        print(table(lines, shutil.get_terminal_size((120, 24)).columns, colours=sys.stdout.isatty()))
    return exit_status(lines)


def table(lines: Sequence[Line], width: int, colours: bool = False) -> str:
    """Check, verdict and finding side by side; a remedy on the line below. The last line counts the verdicts."""
    left = max(len(line.check) for line in lines)
    indent = " " * (left + 8)
    rows = []
    for line in lines:
        verdict = f"{line.verdict.value:<4}"
        verdict = f"\x1b[{_COLOURS[line.verdict]}m{verdict}\x1b[0m" if colours else verdict
        for text, first in ((line.found, f"{line.check:<{left}}  {verdict}  "), (line.remedy, f"{indent}-> ")):
            wrapped = textwrap.wrap(text, max(20, width - len(indent) - 3)) if text else []
            rows += [(first if i == 0 else indent) + part for i, part in enumerate(wrapped)]
    count = {verdict: sum(line.verdict is verdict for line in lines) for verdict in Verdict}
    rows.append(f"{count[Verdict.FAIL]} failed, {count[Verdict.WARN]} with a warning, {count[Verdict.OK]} well")
    return "\n".join(rows)


def _tell(text: str) -> None:
    """What is being done, on a terminal only; the next text takes its place."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
