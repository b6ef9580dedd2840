"""Fuzzing: mutated bodies on every route of a live fleet. `run` is one seed; used by the test and by

    python -m tests.system.fuzz --bodies 5000 --seed 1        # writes benchmarks/results/fuzz-COMMIT.json

No answer may be a fault of ours or late, every refusal has its type, streams end as they should (some are left half
way), and afterwards no process was restarted and nothing is held anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from penstock.fleet import Fleet
from penstock.router import answer_schemas as answers
from penstock.router.openapi import OPERATIONS, Operation
from tests.system.fleets import assert_idle, fleet
from tests.system.fuzz_bodies import mutated
from tests.tiny_models import make_checkpoint

DEADLINE_S = 60.0  # for one answer, on a machine that is busy with others
CONCURRENCY = 8
LEFT = 0.1  # share of the streams whose client leaves after the first event
ENDS = (b"data: [DONE]", b"event: message_stop", b"event: error")
FINAL = (b"event: response.completed", b"event: response.incomplete", b"event: response.failed")
POSTED = {operation.path: operation for operation in OPERATIONS if operation.body is not None}


@dataclass(frozen=True)
class Report:
    """One seed's outcome: answers by route and status, and of the refusals how often each type."""

    seed: int
    bodies: int
    answers: dict[str, dict[str, int]]
    error_types: dict[str, int]
    streams: int
    left: int
    slowest_s: float
    seconds: float


class FuzzFailure(AssertionError):
    """An answer that must not be; holds the body."""


class _Run:
    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self._client, self._random = client, random.Random(seed)
        self.statuses: dict[str, Counter[str]] = {path: Counter() for path in POSTED}
        self.error_types: Counter[str] = Counter()
        self.streams = self.left = 0
        self.slowest_s = 0.0

    async def all(self, bodies: int) -> None:
        """That many bodies, a few at once; which ones depends on the seed alone."""
        paths = sorted(POSTED)
        work = []
        for _ in range(bodies):
            path = self._random.choice(paths)
            work.append((path, mutated(self._random, path), self._random.random() < LEFT))
        queue = iter(work)

        async def some() -> None:
            for path, body, leaves in queue:
                await self._one(path, body, leaves)

        await asyncio.gather(*(some() for _ in range(CONCURRENCY)))

    async def _one(self, path: str, body: bytes, leaves: bool) -> None:
        started = time.monotonic()
        try:
            await asyncio.wait_for(self._ask(path, body, leaves), DEADLINE_S)
        except FuzzFailure:
            raise
        except Exception as error:
            raise FuzzFailure(f"{path}: {error!r} for {body[:2000]!r}") from error
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)

    async def _ask(self, path: str, body: bytes, leaves: bool) -> None:
        headers = {"content-type": "application/json"}
        async with self._client.stream("POST", path, content=body, headers=headers) as answer:
            self.statuses[path][str(answer.status_code)] += 1
            streamed = answer.headers["content-type"].startswith("text/event-stream")
            if streamed and leaves:
                self.streams, self.left = self.streams + 1, self.left + 1
                async for _ in answer.aiter_raw():
                    return
            content = await answer.aread()
        if streamed:
            self.streams += 1
            self._check_stream(path, body, content)
        else:
            self._check(POSTED[path], answer.status_code, body, content)

    def _check(self, operation: Operation, status: int, body: bytes, content: bytes) -> None:
        kinds: Any = answers.AnthropicErrorBody if "messages" in operation.path else answers.ErrorBody
        if status == 200:
            kinds = operation.answer if isinstance(operation.answer, tuple) else (operation.answer,)
        elif not 400 <= status < 500:
            raise FuzzFailure(f"{operation.path}: {status} {content[:500]!r} for {body[:2000]!r}")
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            try:
                found = msgspec.json.decode(content, type=kind)
            except msgspec.ValidationError:
                continue
            if status != 200:
                self.error_types[found.error.type] += 1
            return
        raise FuzzFailure(f"{operation.path}: {status} {content[:500]!r} is no {kinds} for {body[:2000]!r}")

    def _check_stream(self, path: str, body: bytes, content: bytes) -> None:
        last = content.rstrip(b"\n").rpartition(b"\n\n")[2]
        ended = last.startswith(FINAL if path == "/v1/responses" else ENDS)
        if not ended or b'"internal_error"' in content or b'"server_error"' in content or b'"api_error"' in content:
            raise FuzzFailure(f"{path}: a stream that ends with {content[-500:]!r} for {body[:2000]!r}")


def run(seed: int, bodies: int, running: Fleet) -> Report:
    """`bodies` mutated bodies against a fleet; raises FuzzFailure."""
    started, pids = time.monotonic(), running.group.pids()

    async def ask() -> _Run:
        limits = httpx.Limits(max_connections=CONCURRENCY)
        async with httpx.AsyncClient(base_url=running.url, timeout=DEADLINE_S, limits=limits) as client:
            done = _Run(client, seed)
            await done.all(bodies)
            health = await client.get("/health")
        assert health.status_code == 200, health.text
        return done

    done = asyncio.run(ask())
    assert running.group.pids() == pids, "a process was restarted"
    assert_idle(running)
    return Report(
        seed=seed,
        bodies=bodies,
        answers={path: dict(sorted(statuses.items())) for path, statuses in done.statuses.items()},
        error_types=dict(done.error_types.most_common()),
        streams=done.streams,
        left=done.left,
        slowest_s=round(done.slowest_s, 2),
        seconds=round(time.monotonic() - started, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="default: benchmarks/results/fuzz-COMMIT.json")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_checkpoint("qwen2", Path(directory))
        with fleet(checkpoint, prefill_workers=1, **FLEET) as running:
            report = run(options.seed, options.bodies, running)
    result = {
        "commit": commit,
        "machine": f"{platform.machine()}, CPU",
        "fleet": "1 prefill + 1 decode",
        **asdict(report),
    }
    path = options.output or Path(f"benchmarks/results/fuzz-{commit}.json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


# Small, so that even the longest answers are short; parsers on, so that they are fuzzed, too.
FLEET: dict[str, Any] = {
    "max_model_len": 160,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
}

if __name__ == "__main__":
    main()
