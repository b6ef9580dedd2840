"""Fetching a prefix against computing it: time to first token of both at one worker, and what the cost model chooses.

    python benchmarks/fetch.py                         # shm, TCP, and NIXL over TCP, on CPU with the demo model
    python benchmarks/fetch.py --model MODEL --transports cuda_ipc --lengths 1024,8192,32768

Two decode workers. Every prompt is new: for a fetch one worker computes it first, and the other is told to read it
there; for computing nobody has it. The two kinds take turns. The choice is the policy's (router/cost.py), made with the
rates that the reading worker has measured and reported before the first timed prompt, as in a router.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks import record
from penstock.common.bus import BusLink, Connected, Disconnected
from penstock.common.config import ServeConfig
from penstock.common.messages import (
    GenerateRequest,
    HeartbeatAck,
    MeasuredRates,
    Submit,
    TokenBatch,
    WorkerInfo,
    WorkerLoad,
)
from penstock.common.sampling import SamplingParams
from penstock.demo_model import CHECKPOINT
from penstock.fleet import Fleet
from penstock.router.cost import CostPolicy
from penstock.router.policy import Candidate, RequestFacts
from penstock.router.rates import H200_LLAMA8B, measured

LENGTHS = (12, 24, 48, 96, 192, 384, 768, 1536)
TRANSPORTS = ("shm", "tcp", "nixl")
ANSWER_S = 120.0
LEASE_S = 1.0  # three heartbeats in it bring the newest rates


@dataclass(frozen=True)
class Row:
    """One length: medians, what was chosen, and how much slower that is than the better of the two."""

    transport: str
    tokens: int
    compute_ms: float
    fetch_ms: float
    chosen: str
    excess: float  # 0.0: the better one was chosen

    @staticmethod
    def of(transport: str, tokens: int, compute_ms: float, fetch_ms: float, fetch: bool) -> Row:
        """The row of two measured times and a choice."""
        excess = (fetch_ms if fetch else compute_ms) / min(compute_ms, fetch_ms) - 1
        return Row(transport, tokens, compute_ms, fetch_ms, "fetch" if fetch else "compute", excess)


def chooses_fetch(rates: MeasuredRates, reader: WorkerInfo, source: WorkerInfo, tokens: int) -> bool:
    """Whether the policy has an idle `reader` fetch a prompt of `tokens` tokens that `source`, which takes nothing new,
    holds up to the page with its last token."""
    held = (tokens - 1) // source.page_size * source.page_size
    known = measured(rates, H200_LLAMA8B)
    candidates = [
        Candidate(reader, WorkerLoad(), rates=known),
        Candidate(source, WorkerLoad(draining=True), held, rates=known),
    ]
    placement = CostPolicy(fetch=True).choose(RequestFacts(tokens), candidates)
    return placement is not None and placement.source is not None


def crossover(rows: Sequence[Row]) -> float | None:
    """Tokens from which on fetching is faster, between two lengths by straight lines; None: within these, never."""
    for left, right in itertools.pairwise(sorted(rows, key=lambda row: row.tokens)):
        before, after = left.fetch_ms - left.compute_ms, right.fetch_ms - right.compute_ms
        if before > 0 >= after:
            return left.tokens + (right.tokens - left.tokens) * before / (before - after)
    return None


class Client:
    """Submits single requests to workers and times their first tokens."""

    def __init__(self, workers: Sequence[WorkerInfo]) -> None:
        self.rates: dict[str, MeasuredRates] = {}  # by incarnation
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._connected: set[str] = set()
        self._answered: set[str] = set()
        self._count = 0
        self._links = {
            w.incarnation: BusLink(
                w.address, "bench", "router", 1, "", "", self._context, lease_s=LEASE_S, poller=self._poller
            )
            for w in workers
        }
        self._until(lambda: len(self._connected) == len(workers))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for link in self._links.values():
            link.close()
        self._context.term()

    def first_token_ms(self, worker: WorkerInfo, prompt: Sequence[int], source: WorkerInfo | None = None) -> float:
        """Submit a prompt, wait for its token."""
        self._count += 1
        name = f"bench-{self._count}"
        sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=1)
        request = GenerateRequest(request_id=name, prompt_token_ids=list(prompt), sampling=sampling)
        started = time.perf_counter()
        self._links[worker.incarnation].send(Submit(request=request, source=source))
        self._until(lambda: name in self._answered)
        return (time.perf_counter() - started) * 1e3

    def wait_for_rates(self, worker: WorkerInfo) -> MeasuredRates:
        """The worker's rates, as it reports them from now on."""
        self.rates.pop(worker.incarnation, None)
        self._until(lambda: worker.incarnation in self.rates)
        return self.rates[worker.incarnation]

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + ANSWER_S
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit("a worker does not answer")
            self._poller.poll(20)
            for incarnation, link in self._links.items():
                for item in link.receive(time.monotonic()):
                    if isinstance(item, Connected):
                        self._connected.add(incarnation)
                    elif isinstance(item, Disconnected):
                        raise SystemExit(f"a worker is lost: {item.reason}")
                    elif isinstance(item, HeartbeatAck):
                        self.rates[incarnation] = item.load.rates
                    elif isinstance(item, TokenBatch):
                        self._answered.update(d.request_id for d in item.deltas if d.finish is not None)


def measure(
    model: str, transport: str, lengths: Sequence[int], repeats: int, **options: Any
) -> tuple[list[Row], MeasuredRates]:
    """Rows of one transport, and the rates that the choices were made with."""
    config = ServeConfig(model=model, decode_workers=2, kv_transport=transport, port=0, **options)
    chooser = random.Random(1)
    with Fleet(config) as fleet, Client(sorted(fleet.workers().values(), key=lambda w: w.worker_id)) as client:
        source, reader = sorted(fleet.workers().values(), key=lambda worker: worker.worker_id)

        def prompt(tokens: int) -> list[int]:
            return [chooser.randrange(reader.vocab_size) for _ in range(tokens)]

        def compute(tokens: int) -> float:
            return client.first_token_ms(reader, prompt(tokens))

        def fetch(tokens: int) -> float:
            known = prompt(tokens)
            client.first_token_ms(source, known)
            return client.first_token_ms(reader, known, source)

        for tokens in [*lengths] * 4:  # the worker learns its rates
            compute(tokens)
            fetch(tokens)
        rates = client.wait_for_rates(reader)
        times: dict[int, tuple[list[float], list[float]]] = {tokens: ([], []) for tokens in lengths}
        for _ in range(repeats):
            for tokens, (computed, fetched) in times.items():
                computed.append(compute(tokens))
                fetched.append(fetch(tokens))
    rows = [
        Row.of(
            transport,
            tokens,
            statistics.median(computed),
            statistics.median(fetched),
            chooses_fetch(rates, reader, source, tokens),
        )
        for tokens, (computed, fetched) in times.items()
    ]
    return rows, rates


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--transports", default=",".join(TRANSPORTS))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="prompt tokens")
    parser.add_argument("--dtype", default="float32", help="the CPU computes bfloat16 slowly")
    parser.add_argument("--block-size", type=int, default=8, help="tokens in a page")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/fetch-COMMIT.json")
    options = parser.parse_args()
    os.environ.setdefault("UCX_TLS", "tcp")  # between processes of one host UCX would find a shorter way
    lengths = [int(text) for text in options.lengths.split(",")]
    rows: list[Row] = []
    rates: dict[str, Any] = {}
    for transport in options.transports.split(","):
        sizes = {"dtype": options.dtype, "block_size": options.block_size}
        found, known = measure(options.model, transport, lengths, options.repeats, **sizes)
        rates[transport] = {name: getattr(known, name) for name in known.__struct_fields__}
        for row in found:
            print(
                f"{row.transport:8} {row.tokens:6} tokens: computed {row.compute_ms:8.2f} ms, fetched "
                f"{row.fetch_ms:8.2f} ms, chosen: {row.chosen:7} {row.excess:+6.1%}",
                flush=True,
            )
        print(f"{transport}: fetching is faster from {crossover(found) or float('nan'):.0f} tokens on")
        rows += found
    at = record.commit()
    output = options.output or record.RESULTS / record.file_name("fetch", at)
    updates = {"model": Path(options.model).name, "rates": rates, "rows": [asdict(row) for row in rows]}
    record.merge(output, record.machine(), at, updates)
    print(f"wrote {output}; at worst the choice costs {max(row.excess for row in rows):.1%} more than the better one")


if __name__ == "__main__":
    main()
