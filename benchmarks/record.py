"""Result files of the GPU benchmarks: which commit, which machine, and merging a later run into an earlier one's file.

No torch: versions come from package metadata, the card from nvidia-smi.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COMMIT_ENV = "BENCHMARK_COMMIT"  # for a copy of the tree whose git history is missing or another
MEASURED = (
    *("common", "engine", "kernels", "kv_transfer", "models", "penstock"),
    *("decode_worker", "prefill_worker", "router"),
)


def commit() -> str:
    """$BENCHMARK_COMMIT, else the short hash of HEAD, with "+changes" if what is measured differs from it."""
    if named := os.environ.get(COMMIT_ENV):
        return named
    head = _output("git", "rev-parse", "--short", "HEAD")
    if not head:
        return "unknown"
    return head + ("+changes" if _output("git", "status", "--porcelain", "--", *MEASURED) else "")


def machine() -> dict[str, Any]:
    """Card, driver, host and versions."""
    card = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    name, _, driver = card[0].partition(", ") if card else ("none", "", "")
    return {
        "gpu": name,
        "driver": driver,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def merge(path: Path, found_on: Mapping[str, Any], at_commit: str, updates: Mapping[str, Any]) -> None:
    """Write `updates` into a result file: mappings key by key, everything else replaced; a new file if there is none.

    Raises:
        SystemExit: the file holds figures of another card or commit.
    """
    record = json.loads(path.read_text()) if path.exists() else {}
    for what, old, new in (
        ("commit", record.get("commit"), at_commit),
        ("card", record.get("machine", {}).get("gpu"), found_on["gpu"]),
    ):
        if old not in (None, new):
            raise SystemExit(f"{path} holds figures of another {what} ({old}, this is {new}): name another file, --out")
    record = {"commit": at_commit, "machine": dict(found_on)} | {
        key: value for key, value in record.items() if key not in ("commit", "machine")
    }
    for key, value in updates.items():
        record[key] = {**record.get(key, {}), **value} if isinstance(value, Mapping) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    scratch.replace(path)


def file_name(benchmark: str, at_commit: str) -> str:
    return f"{benchmark}-{at_commit.partition('+')[0]}.json"


def _output(*command: str) -> str:
    """What a command prints, or "" if it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
