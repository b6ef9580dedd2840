"""`penstock simulate TRACE`: which policy, how many workers, one phase or two. Reads options, prints a table."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from penstock.client_options import ClientParser, number, whole
from penstock.common.config import ROUTING_POLICIES
from penstock.common.errors import ConfigError
from penstock.router.rates import WorkerRates
from penstock.simulate.plot import draw, need_matplotlib
from penstock.simulate.result import PolicyResult, Slo
from penstock.simulate.runs import compare, needed_ms, scaled
from penstock.simulate.simulator import LLAMA8B_TOKEN_BYTES, FleetShape
from penstock.simulate.sizing import Sized, one_phase, two_phases
from penstock.simulate.trace import TracedRequest, read_trace, repeated, time_scaled

_DESCRIPTION = """\
The router's own policies on virtual workers and a virtual clock.

TRACE is a Mooncake trace (JSON lines), an Azure trace (CSV), or generated:NUMBER. Rates are those of
Llama-3.1-8B on one H200 unless the options below say otherwise. docs/routing.md tells what is modelled.
"""
MOST_WORKERS = 10_000
LONGEST_RUN_MS = 1e10  # 115 days: a clock that tells microseconds apart cannot show more
# Bounds of rates that are not from 0 to 1e6 ms. Times beyond are no numbers any more, or too small to move the clock.
_RATES = {"prefill_tokens_per_s": (1.0, 1e9), "link_bytes_per_s": (1e3, 1e15), "decode_step_ms": (1e-3, 1e6)}
_HEAD = "policy            hit  oracle  max/mean    TTFT p50      p99   ITL p99  within SLO  goodput/s"


def run(arguments: Sequence[str]) -> int:
    """Simulate and return the exit status.

    Raises:
        ConfigError: an option or the trace is wrong, or a file cannot be written.
    """
    options = _parser().parse(list(arguments), os.environ)
    if options.plot is not None:
        need_matplotlib()
    shape = FleetShape(
        workers=options.workers,
        pages_per_worker=options.pages_per_worker,
        page_tokens=options.page_tokens,
        prefill_workers=options.prefill_workers,
        max_num_seqs=options.max_num_seqs,
        token_bytes=options.kv_bytes_per_token,
        rates=WorkerRates(**{rate.name: getattr(options, rate.name) for rate in fields(WorkerRates)}),
        mixed_chunk_tokens=options.mixed_chunk_tokens,
    )
    _check(options)
    slo = Slo(options.slo_ttft, options.slo_tpot)
    requests = read_trace(options.trace, options.page_tokens, options.seed)
    requests = scaled(repeated(requests, options.repeat), shape, options.utilisation)
    if options.load is not None:
        requests = time_scaled(requests, 1 / options.load)
    if requests[-1].arrival_ms > LONGEST_RUN_MS:
        raise ConfigError(f"the requests come over more than {LONGEST_RUN_MS / 86.4e6:.0f} days: too long to simulate")
    if options.find is not None:
        return _find(options, requests, shape, slo)
    policies = ROUTING_POLICIES if options.policy == "all" else (options.policy,)
    print(_HEAD)
    results = []
    for policy in policies:
        results += compare(requests, shape, [policy], slo, options.fetch, options.seed)
        print(_line(results[-1]), flush=True)
    if options.json is not None:
        _write(options.json, {result.policy: asdict(result) for result in results})
    if options.plot is not None:
        draw({f"{Path(options.trace).stem}\n{shape.workers} x {shape.pages_per_worker}": results}, options.plot)
    return 0


def _parser() -> ClientParser:
    parser = ClientParser("penstock simulate", _DESCRIPTION)
    parser.add_argument("trace", metavar="TRACE")
    parser.add_argument("--workers", type=whole(1, MOST_WORKERS), required=True, help="all workers, of both roles")
    parser.add_argument("--pages-per-worker", type=whole(1), required=True)
    parser.add_argument("--policy", default="all", choices=("all", *ROUTING_POLICIES))
    parser.add_argument("--page-tokens", type=whole(1), default=512, help="tokens in a page (default: 512)")
    parser.add_argument(
        "--prefill-workers", type=whole(0), default=0, help="0: one phase, decode workers compute prompts"
    )
    help_fetch = "workers cannot read prefixes from each other"
    parser.add_argument("--no-fetch-prefixes", dest="fetch", action="store_false", help=help_fetch)
    parser.add_argument(
        "--utilisation", type=number(1e-6, 1e6), help="stretch arrivals so that the oracle's work fills this share"
    )
    parser.add_argument(
        "--load", type=number(1e-6, 1e6), metavar="FACTOR", help="requests come so many times as often as traced"
    )
    help_find = "the smallest fleet, of up to --workers, that serves this share of requests within both SLOs"
    parser.add_argument("--find", type=number(1e-6, 1), metavar="SHARE", help=help_find)
    parser.add_argument(
        "--repeat", type=whole(1), default=1, help="play the trace so often, each time with new prefixes"
    )
    parser.add_argument("--max-num-seqs", type=whole(1), default=256, help="most sequences a worker decodes at once")
    parser.add_argument("--slo-ttft", type=number(), default=Slo.ttft_ms, help="milliseconds (default: %(default)s)")
    parser.add_argument("--mixed-chunk-tokens", type=whole(1), help="most prompt tokens in a step that also decodes")
    parser.add_argument("--slo-tpot", type=number(), default=Slo.tpot_ms, help="milliseconds (default: %(default)s)")
    parser.add_argument(
        "--kv-bytes-per-token", type=whole(1), default=LLAMA8B_TOKEN_BYTES, help="(default: %(default)s)"
    )
    for rate in fields(WorkerRates):
        parser.add_argument(
            _flag(rate.name),
            type=number(*_RATES.get(rate.name, (0.0, 1e6))),
            default=rate.default,
            help="(default: %(default)s)",
        )
    parser.add_argument("--seed", type=int, default=0, help="of the random policy and of generated traces")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results: one object a policy")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (PNG); needs penstock[plot]")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.utilisation is not None and (options.load is not None or options.find is not None):
        raise ConfigError("--utilisation is of a given fleet, and sets the load: it cannot stand with --load or --find")
    if options.find is None:
        return
    if options.prefill_workers or options.plot is not None:
        raise ConfigError("--find looks for the number of prefill workers, and draws nothing")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _line(result: PolicyResult) -> str:
    return (
        f"{result.policy:15} {result.hit_ratio:5.3f}   {result.oracle_hit_ratio:5.3f}   "
        f"{result.max_over_mean_load:7.3f}   {result.ttft_p50_ms:7.0f} {result.ttft_p99_ms:8.0f} ms "
        f"{result.itl_p99_ms:6.1f}       {result.slo_attainment:6.3f} {result.goodput:10.2f}"
    )


def _find(options: argparse.Namespace, requests: Sequence[TracedRequest], shape: FleetShape, slo: Slo) -> int:
    """The smallest fleets of one phase and of two; 1: none of up to `--workers` suffices."""
    policy = "cost" if options.policy == "all" else options.policy

    def attempt(workers: int, prefill_workers: int) -> PolicyResult:
        fleet = replace(shape, workers=workers, prefill_workers=prefill_workers)
        (result,) = compare(requests, fleet, [policy], slo, options.fetch, options.seed)
        print(
            f"{_fleet(workers, prefill_workers):>24} workers {100 * result.slo_attainment:6.2f} % within SLOs",
            flush=True,
        )
        return result

    prompts_ms, outputs_ms = needed_ms(requests, shape)
    found = {
        "one phase": one_phase(attempt, shape.workers, options.find),
        "two phases": two_phases(attempt, shape.workers, options.find, prompts_ms / (prompts_ms + outputs_ms)),
    }
    for name, sized in found.items():
        told = f"none of up to {shape.workers}" if sized is None else _fleet(sized.workers, sized.prefill_workers)
        print(f"{name}: {told} workers")
    if options.json is not None:
        _write(options.json, {name: sized and _object(sized) for name, sized in found.items()})
    return 0 if any(found.values()) else 1


def _object(sized: Sized) -> dict[str, Any]:
    return asdict(sized.result) | {"workers": sized.workers, "prefill_workers": sized.prefill_workers}


def _fleet(workers: int, prefill_workers: int) -> str:
    return f"{prefill_workers} prefill + {workers - prefill_workers} decode" if prefill_workers else str(workers)


def _write(path: Path, objects: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(objects, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
