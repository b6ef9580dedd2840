"""Penstock on one H200 beside vLLM: start, first token, decode step, throughput; two shapes with random weights.

    python benchmarks/h200.py                                             # everything; some minutes a model
    python benchmarks/h200.py --models llama8b --only 'decode*' ttft_128_ms
    python benchmarks/h200.py --models qwen1b5 --profile decode_b64_c1024_ms

Each model runs in a process of its own, so that its start is that of a fresh process: once with empty kernel caches
(startup_s), then with those that this run filled (startup_warm_s, and everything else). Figures go into
benchmarks/results/h200-COMMIT.json as they come; a later run at the same commit updates its keys. A key of other sizes
than the table's (decode_b16_c2048_ms) is measured too when --only names it. What the keys mean: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks.record import RESULTS, ROOT, commit, file_name, machine, merge
from benchmarks.shapes import SHAPES, floor, parse_work

LENGTHS = ROOT / "benchmarks" / "workloads" / "sharegpt_like_1000.json"
PEERS = ROOT / "benchmarks" / "peers"
CACHE_VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")
TABLE = (
    *("startup_s", "startup_warm_s"),
    *(f"ttft_{n}_ms" for n in (128, 512, 2048, 8192, 16384, 31744)),
    "ttft_8192_cached_ms",
    *("decode_b1_c128_ms", *(f"decode_b{b}_c1024_ms" for b in (1, 8, 32, 64, 128, 256))),
    *("decode_b32_c8192_ms", "decode_b64_c4096_ms", "sharegptlike", "in1024_out128_x512"),
)
TINY_TABLE = ("startup_s", "startup_warm_s", "ttft_8_ms", "ttft_16_cached_ms", "decode_b2_c16_ms", "in8_out4_x6")
ENGINE = {"max_num_seqs": 256, "max_model_len": 32768, "gpu_memory_utilization": 0.85}
TINY_ENGINE = {"max_num_seqs": 8, "max_model_len": 256, "block_size": 4, "kv_cache_memory_bytes": 4 << 20}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=["llama8b", "qwen1b5"], choices=sorted(SHAPES), metavar="NAME")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="KEY", help="keys, or patterns of them")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/h200-COMMIT.json)")
    parser.add_argument("--engine-option", nargs="+", default=[], metavar="NAME=VALUE", help="options of LLM")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument(
        "--cold",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start with empty caches first; --no-cold uses this machine's, and leaves out startup_s",
    )
    parser.add_argument("--profile", nargs="+", metavar="KEY", help="profile these works instead of timing any")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for key in options.profile or ():
        if parse_work(key) is None:
            parser.error(f"--profile {key}: no such work")
    try:
        options.engine = engine_options(options.engine_option)
    except ValueError as error:
        parser.error(str(error))
    return options


def engine_options(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs as keyword arguments; values are JSON where they can be read so, else text.

    Raises:
        ValueError: one is no pair.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--engine-option {pair}: give NAME=VALUE")
        try:
            found[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            found[name.replace("-", "_")] = {"True": True, "False": False}.get(text, text)
    return found


def keys_of(model: str, patterns: Sequence[str]) -> list[str]:
    """Keys to measure, in the table's order; then those that are named in full and stand in no table."""
    table = TINY_TABLE if model == "tiny" else TABLE
    chosen = [key for key in table if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)]
    return chosen + [key for key in dict.fromkeys(patterns) if key not in table and parse_work(key)]


def rows(model: str, measured: Mapping[str, Any]) -> list[list[str]]:
    """The comparison: key, ours, vLLM's, first mark, aim, floor, and ours over vLLM's and over the floor."""
    peer = json.loads((PEERS / "vllm-0.22.1-h200.json").read_text()).get(model, {})
    marks = json.loads((PEERS / "marks-h200.json").read_text()).get(model, {})
    lengths = json.loads(LENGTHS.read_text())
    table = [["", "Penstock", "vLLM", "first mark", "aim", "floor", "/ vLLM", "/ floor"]]
    for key, value in measured.items():
        work = parse_work(key)
        if work is None:
            continue
        ours, theirs = _number(value), _number(peer.get(key))
        least = floor(SHAPES[model], work, lengths)
        first, aim = marks.get(key, (None, None))
        ratios = [_ratio(ours, theirs), _ratio(ours, least)]
        table.append([key, *(_shown(figure) for figure in (ours, theirs, first, aim, least)), *ratios])
    return table


def print_table(table: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for name, *cells in table:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)))


def _number(value: Any) -> float | None:
    number: float | None = value["s"] if isinstance(value, dict) else value
    return number


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _ratio(ours: float | None, other: float | None) -> str:
    return "-" if not ours or not other else f"{ours / other:.2f}"


def run_worker(job: Mapping[str, Any], environment: Mapping[str, str], take: Callable[[str, Any], None]) -> int:
    """Run one measuring process, `take` each figure as it comes, show what else it prints; its exit status."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    job = {**job, "started": time.monotonic()}
    with subprocess.Popen(
        [*command, json.dumps(job)], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("@result "):
                found = json.loads(line.removeprefix("@result "))
                print(f"{found['key']}: {found['value']}", flush=True)
                take(found["key"], found["value"])
            else:
                print(line, end="", flush=True)
    return process.returncode


def measure(model: str, options: argparse.Namespace, take: Callable[[str, Any], None]) -> int:
    """Measure one model; 0 when all went well."""
    keys = keys_of(model, options.only)
    if not options.cold:
        keys = [key for key in keys if key != "startup_s"]
    with tempfile.TemporaryDirectory(prefix="penstock-h200-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[model].config()))
        job = {
            "model": folder,
            "keys": [key for key in keys if key != "startup_s"],
            "lengths": str(LENGTHS),
            "engine": {**(TINY_ENGINE if model == "tiny" else ENGINE), "device": options.device, **options.engine},
            "repeats": 3 if options.quick else 5,
            "decode_repeats": 1 if options.quick else 3,
            "profile": bool(options.profile),
        }
        if options.profile:
            return run_worker({**job, "keys": options.profile}, {}, take)
        caches: dict[str, str] = {}
        status = 0
        if "startup_s" in keys:
            caches = {name: str(Path(folder) / "cache" / name.lower()) for name in CACHE_VARIABLES}
            status = run_worker({**job, "keys": ["startup_s"]}, caches, take)
        if job["keys"]:
            status = run_worker(job, caches, take) or status
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    at_commit, found_on = commit(), machine()
    path = options.out or RESULTS / file_name("h200", at_commit)
    status = 0
    for model in options.models:
        print(f"== {model}", flush=True)
        measured: dict[str, Any] = {}

        def take(key: str, value: Any, model: str = model, measured: dict[str, Any] = measured) -> None:
            measured[key] = value
            merge(path, found_on, at_commit, {model: {key: value}})

        status = measure(model, options, take) or status
        if measured:
            print(f"\n{model}, {found_on['gpu']}, commit {at_commit} (ms; start and throughput: s)")
            print_table(rows(model, measured))
            print(path, flush=True)
    return 1 if status else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        from benchmarks.h200_worker import Job, work_on

        sys.exit(1 if work_on(Job(**json.loads(sys.argv[2]))) else 0)
    sys.exit(main())
