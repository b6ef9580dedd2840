"""Chaos: a fleet under load to which bad things happen at random moments. `run_seed` is one seed, for the test and for

    python -m tests.system.chaos --seeds 10        # writes benchmarks/results/chaos-COMMIT.json

Workers are killed, stopped for longer than a lease and continued (what they read or lent may land late), told to drain;
Redis and the router are killed; clients leave; the pool is too small for all. Every answer must be token-exact or a
typed error (or a stream that a dying router has closed), none may be late, and afterwards nothing may be held anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI

from penstock.common.sampling import SamplingParams
from penstock.fleet import Fleet
from tests.engine.engines import make_engine, request, run, smallest_margin
from tests.system.fleets import SHORT_LEASE_S, assert_idle, complete, fleet, metric, router_metric
from tests.tiny_models import FAMILIES, MIN_MARGIN, make_checkpoint, random_prompts, reference_tokens

REQUESTS = 200
PROMPTS = 20
NEW_TOKENS = 120  # the most; every fourth request wants one token, another one two
LENGTHS = (1, 2, 40, NEW_TOKENS)
LOAD_S = 18.0
LEFT, CLOSED = "left", "closed"
STOPPED_S = SHORT_LEASE_S + 1.0
RESTARTED_S = 60.0  # the last to leave may still be draining when the load is over, and has to start again
ROUTER_AWAY_S = 20.0  # from its death until the next one answers, on a busy machine
DEADLINE_S = 60.0  # from sending a request to its end, whatever dies
TYPED = {"unavailable", "worker_lost", "timeout", "queue_timeout", "overloaded"}


@dataclass(frozen=True)
class Report:
    """One seed's outcome."""

    seed: int
    family: str
    pool_mib: int
    faults: list[tuple[float, str, str]]  # seconds after the start, what, to whom
    exact: int
    left: int  # by their clients
    closed: int  # when a router died
    typed_errors: dict[str, int]
    slowest_s: float
    retries: int
    moves: int
    fetches: int
    seconds: float


class ChaosFailure(AssertionError):
    """An answer was wrong, late, or failed without a type."""


def run_seed(seed: int, directory: Path, *, requests: int = REQUESTS, load_s: float = LOAD_S) -> Report:
    """Run one seed; raises `ChaosFailure` (or an assertion about what is left) unless all is well."""
    chooser = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    path = make_checkpoint(family, directory / f"{family}-{seed}")
    prompts = random_prompts([chooser.choice((3, 17, 64, 120, 200, 300)) for _ in range(PROMPTS)], seed=seed)
    oracles = [_greedy_oracle(path, prompts), _seeded_oracle(path, prompts)]
    started = time.monotonic()
    options = {
        "lease_s": SHORT_LEASE_S,
        "prefill_workers": 2,
        "decode_workers": 2,
        "max_num_batched_tokens": 32,
        "cpu_threads": 1,
    }
    pool_mib = chooser.choice((1, 4, 16))  # 1 MiB: some have to wait, or are preempted
    with fleet(path, **options, kv_cache_memory_bytes=pool_mib << 20, max_model_len=512) as running:
        plan = _plan(chooser, sorted(running.worker_pids()), load_s, router=seed % 3 == 0)
        outcomes = asyncio.run(_load(running, plan, chooser, prompts, oracles, requests, load_s))
        running.wait_ready(60)
        assert_idle(running, RESTARTED_S)
        counted = Counter(code for code, _ in outcomes if code)
        return Report(
            seed,
            family,
            pool_mib,
            plan,
            sum(code == "" for code, _ in outcomes),
            counted.pop(LEFT, 0),
            counted.pop(CLOSED, 0),
            dict(counted),
            round(max(seconds for _, seconds in outcomes), 2),
            int(router_metric(running.url, "penstock:retries_total")),
            int(router_metric(running.url, "penstock:moves_total")),
            int(metric(running, "penstock:fetches_total")),
            round(time.monotonic() - started, 1),
        )


def _plan(chooser: random.Random, workers: list[str], load_s: float, *, router: bool) -> list[tuple[float, str, str]]:
    """Faults in order of time; the router's death only on request: what is in flight there is lost, as it must be."""
    faults = [("kill", chooser.choice(workers)) for _ in range(chooser.randint(3, 5))]
    faults += [("stop", chooser.choice(workers)) for _ in range(2)]
    decoders = [worker for worker in workers if worker.startswith("decode")]
    faults += [("drain", chooser.choice(decoders))]  # what runs there moves with its pages
    faults += [("kill", "redis")]
    faults += [("kill", "router")] * router
    times = sorted(round(chooser.uniform(0.5, load_s), 2) for _ in faults)
    chooser.shuffle(faults)
    return [(at, *fault) for at, fault in zip(times, faults, strict=True)]


async def _carry_out(running: Fleet, at: float, fault: str, target: str) -> None:
    await asyncio.sleep(at)
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "drain": signal.SIGTERM}[fault]
    running.kill(target, number)
    if fault == "stop":
        await asyncio.sleep(STOPPED_S)
        running.kill(target, signal.SIGCONT)


async def _load(
    running: Fleet,
    plan: list[tuple[float, str, str]],
    chooser: random.Random,
    prompts: list[list[int]],
    oracles: list[list[list[int]]],
    requests: int,
    load_s: float,
) -> list[tuple[str, float]]:
    began_at = time.monotonic()
    router_dies = [began_at + at for at, _, target in plan if target == "router"]

    async with AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client:

        async def one(
            delay_s: float, index: int, seeded: bool, stream: bool, count: int, patience_s: float | None
        ) -> tuple[str, float]:
            await asyncio.sleep(delay_s)
            began = time.monotonic()
            fields: dict[str, Any] = {"temperature": 0.8, "seed": index} if seeded else {}
            answer = complete(client, prompts[index], count, stream=stream, **fields)
            try:
                tokens = await asyncio.wait_for(answer, patience_s)
            except asyncio.TimeoutError:
                return LEFT, time.monotonic() - began
            except (APIError, httpx.HTTPError) as error:
                ended = time.monotonic()
                if _cut(error) and any(dies <= ended and began <= dies + ROUTER_AWAY_S for dies in router_dies):
                    return CLOSED, ended - began
                return code_of(error), ended - began
            expected = oracles[seeded][index][:count]
            if tokens[: len(expected)] != expected or len(tokens) != count:
                raise ChaosFailure(f"prompt {index}, seeded {seeded}: {tokens} instead of {expected}")
            return "", time.monotonic() - began

        work = [
            one(
                chooser.uniform(0, load_s),
                chooser.randrange(PROMPTS),
                chooser.random() < 0.5,
                chooser.random() < 0.5,
                chooser.choice(LENGTHS),
                chooser.uniform(0.0, 1.0) if chooser.random() < 0.05 else None,
            )
            for _ in range(requests)
        ]
        results = await asyncio.gather(*work, *(_carry_out(running, *fault) for fault in plan))
    outcomes = [outcome for outcome in results if outcome is not None]
    late = [seconds for _, seconds in outcomes if seconds > DEADLINE_S]
    if late:
        raise ChaosFailure(f"{len(late)} answers came late: {late}")
    return outcomes


def _cut(error: Exception) -> bool:
    """Whether the connection was refused or closed: nobody was there to say why."""
    return isinstance(error, (APIConnectionError, httpx.TransportError))


def code_of(error: Exception) -> str:
    """The typed code of a failure; anything else is a failure of the test."""
    body = error.body if isinstance(error, APIError) else None
    code = body.get("code") if isinstance(body, dict) else None
    if code not in TYPED or (isinstance(error, APIStatusError) and error.status_code < 429):
        raise ChaosFailure(f"not a typed error: {error!r}, body {body}") from error
    return str(code)


def _greedy_oracle(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    return reference_tokens(path, prompts, NEW_TOKENS, until_tie=True)


def _seeded_oracle(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The engine alone, undisturbed, in this process."""
    built = make_engine(path, max_num_batched_tokens=512)
    tokens = []
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.8, seed=i, max_tokens=NEW_TOKENS, ignore_eos=True)
        with smallest_margin() as margins:
            tokens.append(run(built, [(0, request(str(i), prompt, sampling))])[0][str(i)])
        # A near-tie may fall either way when the request is batched differently: the answer ends before it.
        near = next((n for n, margin in enumerate(margins) if margin < MIN_MARGIN), len(margins))
        tokens[-1] = tokens[-1][:near]
    built.engine.close()
    return tokens


def main() -> None:
    """Run seeds, print a line each, add each to the record."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/chaos-COMMIT.json")
    arguments = parser.parse_args()
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    output = arguments.output or Path("benchmarks/results") / f"chaos-{commit}.json"
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"] if output.exists() else []
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        with tempfile.TemporaryDirectory() as directory:
            report = run_seed(seed, Path(directory))
        print(report, flush=True)
        rows.append(asdict(report))
        record = {"commit": commit, "machine": platform.machine(), "requests_per_seed": REQUESTS, "rows": rows}
        output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
