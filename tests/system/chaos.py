"""Chaos: a fleet under load to which bad things happen at random moments. `run_seed` is one seed, for the test and for

    python -m tests.system.chaos --seeds 10        # writes benchmarks/results/chaos-COMMIT.json

Workers are killed, stopped for longer than a lease and continued (what they read or lent may land late), cut off, told
to drain; pages break on their way; Redis and the router are killed; clients leave; the pool is too small for all. One
decode worker is left to serve, but for some seeds in which all of them die at once. Every answer must be exact
(chaos_cases.py) or a typed error (or a stream that a dying router has closed, whose tokens were right), none may be
late, no process may die by itself, and afterwards nothing may be held anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, AsyncOpenAI

from penstock.console import Console
from penstock.fleet import Fleet
from tests.system.chaos_cases import KINDS, Answer, Case, make_cases
from tests.system.fleets import SHORT_LEASE_S, FleetOf, assert_idle, fleet_config, metric, router_metric
from tests.tiny_models import FAMILIES, make_checkpoint

TRANSPORTS = ("shm", "tcp")
REQUESTS = 200
CASES = 21
LOAD_S = 18.0
AT_ONCE = 16  # requests under way
EXACT, LEFT, CLOSED = "exact", "left", "closed"
STOPPED_S = {"stop": SHORT_LEASE_S + 1.0, "hang": SHORT_LEASE_S + 5.0}  # routers notice the second, after 5 s
RESTARTED_S = 120.0  # the last to leave may still be draining when the load is over, and has to start again
ROUTER_AWAY_S = 60.0  # from its death until the next one answers, on a busy machine
POLL_S = 0.2
AGAIN_S = 0.3  # a client that nobody takes a connection of tries again
MORE_FILES = 24  # links to others at most; two hundred requests that leave one each are more
DEADLINE_S = 90.0  # from sending a request to its end, whatever dies
TYPED = {"unavailable", "worker_lost", "timeout", "queue_timeout", "overloaded"}
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "hang": signal.SIGSTOP,
    "drain": signal.SIGTERM,
    "cut": signal.SIGUSR1,
    "break": signal.SIGUSR2,
}
HARMFUL = ("kill", "stop", "hang", "drain")  # for a while its target serves nobody
SERVING = ("up", "starting", "probing")
DECODE_WORKERS = ("decode-0", "decode-1")
DECODERS = "decoders"  # all of them
FaultAt = tuple[float, str, str]  # seconds after the start, what, to whom


@dataclass(frozen=True)
class Report:
    """One seed's outcome."""

    seed: int
    family: str
    transport: str
    pool_mib: int
    faults: list[FaultAt]
    exact: dict[str, int]  # by kind of request
    left: int  # by their clients
    closed: int  # when the router died
    typed_errors: dict[str, int]  # by code and message
    slowest_s: float
    router_back_s: float  # from its death until the next one was ready
    retries: int
    moves: int
    preemptions: int  # at the workers that were there at the end
    pages_broken: int  # on their way to a reader
    pages_refused: int  # by readers: checksums differ
    more_files: int  # open in the process that has most more than at the start, links to others among them
    seconds: float


class ChaosFailure(AssertionError):
    """An answer was wrong, late, or failed without a type."""


class _Witness(Console):
    """Shows what the processes say, and counts it."""

    def __init__(self) -> None:
        super().__init__()
        self._said: list[str] = []

    def line(self, name: str, text: str) -> None:
        self._said.append(text)
        super().line(name, text)

    def count(self, words: str) -> int:
        """Lines with these words in them."""
        return sum(words in text for text in self._said)


def run_seed(seed: int, directory: Path, *, load_s: float = LOAD_S, blackout: bool = False) -> Report:
    """Run one seed; in a `blackout` all decode workers die at once. Raises `ChaosFailure`, or an assertion about what
    is left, unless all is well."""
    chooser = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    path = make_checkpoint(family, directory / f"{family}-{seed}")
    started = time.monotonic()
    pool_mib = chooser.choice((1, 2, 8))  # 1 MiB: some have to wait, or are preempted
    options = {"prefill_workers": 2, "decode_workers": 2, "max_num_batched_tokens": 32, "cpu_threads": 1}
    options |= {"kv_cache_memory_bytes": pool_mib << 20, "max_model_len": 512}
    options |= {"kv_transport": (transport := TRANSPORTS[seed % len(TRANSPORTS)])}
    config = fleet_config(path, lease_s=SHORT_LEASE_S, **options)
    running = FleetOf("tests.system.faulty", config, console=(console := _Witness()))
    with _nothing_left(running):
        running.start()
        cases = make_cases(path, chooser, CASES)  # while it starts
        running.wait_ready()
        opened = descriptors(running)
        plan = _plan(chooser, sorted(running.worker_pids()), blackout=blackout)
        load = Load(running, cases, plan, load_s)
        outcomes = asyncio.run(load.run(chooser, REQUESTS))
        running.wait_ready(RESTARTED_S)
        assert_idle(running, RESTARTED_S)
        more = max(number - opened[name] for name, number in descriptors(running).items())
        assert more <= MORE_FILES, f"{more} more open files than at the start: {descriptors(running)}"
        assert console.count("Traceback") == 0, "a process has crashed by itself"
        assert console.count("held for nobody") == 0, "a page was forgotten, if only for a second"
        counted = Counter(outcome.what for outcome in outcomes)
        return Report(
            seed,
            family,
            transport,
            pool_mib,
            load.happened,
            dict(Counter(outcome.kind for outcome in outcomes if outcome.what == EXACT)),
            counted[LEFT],
            counted[CLOSED],
            {what: number for what, number in counted.items() if what not in (EXACT, LEFT, CLOSED)},
            round(max(outcome.seconds for outcome in outcomes), 2),
            round(load.router_back_s, 2),
            **load.counts(),
            preemptions=int(metric(running, "vllm:num_preemptions_total")),
            pages_broken=console.count("broke a page"),
            pages_refused=console.count("checksums of"),
            more_files=more,
            seconds=round(time.monotonic() - started, 1),
        )


@contextlib.contextmanager
def _nothing_left(running: Fleet) -> Iterator[None]:
    """Stop the fleet at the end; then none of the processes it ever had may be there."""
    children = set()
    try:
        yield
        children = set(running.group.pids().values())
    finally:
        running.stop()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def _plan(chooser: random.Random, workers: list[str], *, blackout: bool) -> list[FaultAt]:
    """Faults in order; when, as a share of the requests that have begun. In a `blackout` all decode workers die."""
    faults = [("kill", chooser.choice(workers)) for _ in range(chooser.randint(3, 5))]
    faults += [(fault, chooser.choice(workers)) for fault in STOPPED_S]
    faults += [("cut", chooser.choice(workers)) for _ in range(2)]
    faults += [("break", worker) for worker in DECODE_WORKERS]
    faults += [("drain", chooser.choice(DECODE_WORKERS))]  # what runs there moves with its pages
    faults += [("kill", "redis"), ("kill", "router")]
    faults += [("kill", DECODERS)] * blackout
    times = sorted(round(chooser.uniform(0.03, 1.0), 3) for _ in faults)
    chooser.shuffle(faults)
    return [(at, *fault) for at, fault in zip(times, faults, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """How one request ended: EXACT, LEFT, CLOSED, or its error."""

    kind: str
    what: str
    seconds: float


@dataclass
class Load:
    """Requests at random moments of `load_s` seconds, or as soon as few enough are under way, and faults among them."""

    running: Fleet
    cases: list[Case]
    plan: list[FaultAt]
    load_s: float
    router_back_s: float = 0.0
    happened: list[FaultAt] = field(default_factory=list)
    _counted: Counter[str] = field(default_factory=Counter)  # by routers that are dead now
    _begun: int = 0
    _over: bool = False
    _harmed: dict[str, str] = field(default_factory=dict)  # incarnation of a decode worker that serves nobody
    _at_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)
    _began_at: float = field(default_factory=time.monotonic)

    async def run(self, chooser: random.Random, requests: int) -> list[Outcome]:
        """All of it; how every request ended. Faults that are still waiting then do not happen."""
        self._began_at = time.monotonic()
        url = f"{self.running.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
            work = []
            for _ in range(requests):
                case = chooser.choice(self.cases)
                patience_s = chooser.uniform(0.0, 1.0) if chooser.random() < 0.05 else None
                stream, at = chooser.random() < 0.5, chooser.uniform(0, self.load_s)
                work.append(self._one(client, case, chooser.choice(case.lengths()), stream, at, patience_s))
            faults = [asyncio.create_task(self._carry_out(at * requests, *fault)) for at, *fault in self.plan]
            outcomes = list(await asyncio.gather(*work))
            self._over = True
            await asyncio.gather(*faults)
        late = [outcome for outcome in outcomes if outcome.seconds > DEADLINE_S]
        if late:
            raise ChaosFailure(f"{len(late)} answers came late: {late}")
        return outcomes

    def counts(self) -> dict[str, int]:
        """Attempts that followed others, as all routers counted them."""
        return {name: number + self._counted[name] for name, number in router_counts(self.running).items()}

    async def _one(
        self, client: AsyncOpenAI, case: Case, max_tokens: int, stream: bool, at: float, patience_s: float | None
    ) -> Outcome:
        await asyncio.sleep(at)
        async with self._at_once:
            self._begun += 1
            began = time.monotonic()
            answer = Answer()
            try:
                what = await asyncio.wait_for(self._ask(client, case, max_tokens, stream, answer), patience_s)
            except asyncio.TimeoutError:
                what = LEFT
        fault = answer.fault(case, max_tokens, whole=what == EXACT)
        if fault:
            raise ChaosFailure(f"{case.kind}, {case.sampling}, prompt {case.prompt}, stream {stream}, {what}: {fault}")
        return Outcome(case.kind, what, time.monotonic() - began)

    async def _ask(self, client: AsyncOpenAI, case: Case, max_tokens: int, stream: bool, answer: Answer) -> str:
        began = time.monotonic()
        while True:
            try:
                await answer.ask(client, case, max_tokens, stream=stream)
                return EXACT
            except (APIError, httpx.HTTPError) as error:
                if isinstance(error, APITimeoutError):
                    raise ChaosFailure(f"{case.kind}: no answer within {DEADLINE_S} s, stream {stream}") from error
                after_a_death = self._router_died(began, time.monotonic())
                if not isinstance(error, (APIConnectionError, httpx.TransportError)):
                    return f"{code_of(error)}: {error}"
                if not after_a_death:
                    raise ChaosFailure(f"the connection broke, and no router had died: {error!r}") from error
                if type(error.__cause__).__name__ != "ConnectError":  # of httpx or httpx2, as the client has it
                    return CLOSED
                await asyncio.sleep(AGAIN_S)  # nobody took it

    def _router_died(self, since: float, until: float) -> bool:
        times = [self._began_at + at for at, _, target in self.happened if target == "router"]
        return any(dies <= until and since <= dies + ROUTER_AWAY_S for dies in times)

    async def _carry_out(self, after: float, fault: str, target: str) -> None:
        """Harm `target` once more than `after` requests have begun. What would come when all have ended does not."""
        while self._begun <= after:
            await asyncio.sleep(POLL_S)
        async with self._one_at_a_time:
            targets = [target] if target != DECODERS else [w for w in self.running.worker_pids() if w in DECODE_WORKERS]
            if fault in HARMFUL and target in DECODE_WORKERS:
                await self._until_spared(target)
            while fault in ("cut", "break") and not self._over and target not in await self._names():
                await asyncio.sleep(POLL_S)  # it is just starting: the signal would end it
            if self._over:
                return
            if target == "router":
                self._counted.update(await asyncio.to_thread(router_counts, self.running))
            self.happened.append((round(time.monotonic() - self._began_at, 2), fault, target))
            for one in targets:
                self.running.kill(one, SIGNALS[fault])
        if fault in STOPPED_S:
            await asyncio.sleep(STOPPED_S[fault])
            self.running.kill(target, signal.SIGCONT)
            self._harmed.pop(target, None)
        if target == "router":
            began = time.monotonic()
            while await self._fleet() is None:
                await asyncio.sleep(POLL_S)
            self.router_back_s = time.monotonic() - began

    async def _until_spared(self, target: str) -> None:
        """Until another decode worker than `target` serves; who has come to harm does when it has restarted."""
        while not self._over:
            workers = await self._fleet() or []
            serving = {worker["worker_id"]: worker["incarnation"] for worker in workers if worker["state"] in SERVING}
            others = [name for name in DECODE_WORKERS if name != target and name in serving]
            if any(self._harmed.get(name) != serving[name] for name in others):
                self._harmed[target] = serving.get(target, "")
                return
            await asyncio.sleep(POLL_S)

    async def _names(self) -> list[str]:
        return [worker["worker_id"] for worker in await self._fleet() or []]

    async def _fleet(self) -> list[dict[str, Any]] | None:
        """The workers, as a router that is ready sees them."""
        async with httpx.AsyncClient(base_url=self.running.url, timeout=5) as client:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/health")).status_code == 200:
                    workers: list[dict[str, Any]] = (await client.get("/fleet")).json()["workers"]
                    return workers
        return None


def router_counts(running: Fleet) -> dict[str, int]:
    """Attempts that followed others, since the router started."""
    return {name: int(router_metric(running.url, f"penstock:{name}_total")) for name in ("retries", "moves")}


def descriptors(running: Fleet) -> dict[str, int]:
    """Open files of every process."""
    return {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in running.group.pids().items()}


def code_of(error: Exception) -> str:
    """The typed code of a failure; anything else is a failure of the test."""
    body = error.body if isinstance(error, APIError) else None
    code = body.get("code") if isinstance(body, dict) else None
    if code not in TYPED or (isinstance(error, APIStatusError) and error.status_code < 429):
        raise ChaosFailure(f"not a typed error: {error!r}, body {body}") from error
    return str(code)


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
            report = run_seed(seed, Path(directory), blackout=seed % 4 == 0)
        print(report, flush=True)
        rows.append(asdict(report))
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        record = {"commit": commit, "machine": machine, "requests_per_seed": REQUESTS, **totals(rows), "rows": rows}
        output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {output}")


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all seeds: faults, and how requests ended."""
    faults = Counter(f"{what} {whom.rpartition('-')[0] or whom}" for row in rows for _, what, whom in row["faults"])
    exact, errors = Counter[str](), Counter[str]()
    for row in rows:
        exact.update(row["exact"])
        errors.update(row["typed_errors"])
    return {
        "requests": len(rows) * REQUESTS,
        "faults": dict(faults),
        "exact": {"all": exact.total(), **{kind: exact[kind] for kind in KINDS}},
        "left": sum(row["left"] for row in rows),
        "closed": sum(row["closed"] for row in rows),
        "typed_errors": dict(errors),
        **{name: sum(row[name] for row in rows) for name in ("retries", "moves", "pages_broken", "pages_refused")},
        "slowest_s": max(row["slowest_s"] for row in rows),
        "router_back_s": max(row["router_back_s"] for row in rows),
    }


if __name__ == "__main__":
    main()
