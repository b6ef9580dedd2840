"""Real worker processes, and a router double that speaks to one decode worker over a real bus link."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from penstock.common.bus import BusLink, Connected, Disconnected
from penstock.common.messages import Finish, Submit, TokenBatch, TokenDelta, WorkerInfo, decode_worker_info
from tests.forking import ForkedPython
from tests.stopping import stop_process
from tests.two_hosts import Host

START_S = 60.0
LEASE_S = 30.0  # no busy machine lets a peer be silent for so long: what a lease's end does is tested elsewhere


@dataclass
class WorkerProcess:
    """A `penstock prefill|decode` process and what it registered."""

    process: subprocess.Popen[bytes]
    worker_id: str
    info: WorkerInfo | None = None

    def ledger(self) -> dict[str, Any]:
        assert self.info is not None
        with urllib.request.urlopen(f"{self.info.status_url}/debug/ledger", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def wait_for(self, seconds: float = 60.0, **wanted: int) -> dict[str, Any]:
        """Poll the ledger until these fields have these values."""
        deadline = time.monotonic() + seconds
        while True:
            ledger = self.ledger()
            if all(ledger[name] == value for name, value in wanted.items()):
                return ledger
            assert time.monotonic() < deadline, f"{self.worker_id}: wanted {wanted}, got {ledger}"
            time.sleep(0.02)

    def assert_idle(self) -> None:
        """Nothing is held for anybody."""
        names = ("running", "waiting", "held_pages", "promised_pages")
        self.wait_for(**dict.fromkeys(names, 0))
        extra = self.ledger()
        for name in ("requests", "admission", "handoffs", "reads", "lent_pages", "quarantined_pages", "forgotten"):
            assert not extra.get(name, 0), extra

    def metric(self, name: str) -> float:
        """As of now: /metrics says what the last turn of its loop has left, and a ledger is told after a turn."""
        self.ledger()
        assert self.info is not None
        with urllib.request.urlopen(f"{self.info.status_url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")]
        assert found, f"{self.worker_id} has no metric {name}"
        return sum(found)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        if signum == signal.SIGSTOP:
            stop_process(self.process.pid)
        else:
            self.process.send_signal(signum)
        if signum in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait(START_S)


@contextlib.contextmanager
def workers(
    redis_url: str,
    model: Path,
    roles: dict[str, str],
    *,
    module: str = "penstock",
    hosts: Mapping[str, Host] | None = None,
    **flags: object,
) -> Iterator[dict[str, WorkerProcess]]:
    """Start workers {worker_id: role}, on `hosts` if given; yields once all are registered. At the end all must exit
    cleanly."""
    import redis

    common = {"lease_s": LEASE_S, "device": "cpu", "cpu_threads": 1, "redis_url": redis_url, "drain_s": 5, **flags}
    started: dict[str, WorkerProcess] = {}
    with contextlib.ExitStack() as stack:
        for worker_id, role in roles.items():
            host = hosts[worker_id] if hosts else None
            own = {**common, "worker_id": worker_id, **({"bus_host": host.address} if host else {})}
            arguments = [part for name, value in own.items() for part in (f"--{name.replace('_', '-')}", str(value))]
            command = [*(host.inside if host else ()), sys.executable, "-m", module, role, str(model), *arguments]
            process = ForkedPython(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
            started[worker_id] = WorkerProcess(process, worker_id)
            stack.callback(_reap, process)
        client = redis.Redis.from_url(redis_url)
        stack.callback(client.close)
        deadline = time.monotonic() + START_S
        while not all(worker.info for worker in started.values()):
            for key in client.scan_iter("penstock:worker:*"):
                record = client.get(key)
                if record:
                    info = decode_worker_info(record)
                    if info.worker_id in started:
                        started[info.worker_id].info = info
            assert all(worker.process.poll() is None for worker in started.values()), "a worker died at start"
            assert time.monotonic() < deadline, "workers did not register"
            time.sleep(0.05)
        yield started
        for worker in started.values():
            if worker.process.poll() is None:
                worker.process.terminate()
        for worker in started.values():
            if worker.process.returncode is None:
                assert worker.process.wait(START_S) == 0, f"{worker.worker_id} did not exit cleanly"


def _reap(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


@dataclass
class Answer:
    """What arrived for one request."""

    deltas: list[TokenDelta] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def tokens(self) -> list[int]:
        """Tokens in order of index; duplicates must agree, and nothing may be missing."""
        by_index = self._by_index()
        return [by_index[i] for i in range(len(by_index))]

    @property
    def whole(self) -> bool:
        """It has its end, and all before it: a prefill worker's first token comes over another link, maybe later."""
        return self.finish is not None and self._by_index().keys() == set(range(len(self._by_index())))

    def _by_index(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for delta in self.deltas:
            for offset, token in enumerate(delta.token_ids):
                assert found.setdefault(delta.index + offset, token) == token
        return found


class RouterDouble:
    """Submits to decode workers and collects deltas; no retries, no policy."""

    def __init__(self, *decodes: WorkerInfo, peer_id: str = "router-double") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._links = {
            w.incarnation: BusLink(w.address, peer_id, "router", 1, "", "", self._context, lease_s=LEASE_S)
            for w in decodes
        }
        self.answers: dict[tuple[str, int], Answer] = {}
        self.connected: set[str] = set()
        self.lost: list[str] = []

    def submit(self, worker: WorkerInfo, message: Submit) -> None:
        self.answers[message.request.request_id, message.request.choice] = Answer()
        self._links[worker.incarnation].send(message)

    def send(self, worker: WorkerInfo, message: Any) -> None:
        self._links[worker.incarnation].send(message)

    def wait_connected(self) -> None:
        deadline = time.monotonic() + START_S
        while len(self.connected) < len(self._links):
            self.turn()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def turn(self) -> None:
        for incarnation, link in self._links.items():
            for item in link.receive(time.monotonic()):
                if isinstance(item, Connected):
                    self.connected.add(incarnation)
                elif isinstance(item, Disconnected):
                    self.lost.append(incarnation)
                elif isinstance(item, TokenBatch):
                    for delta in item.deltas:
                        answer = self.answers.get((delta.request_id, delta.choice))
                        if answer is not None:  # else aborted and forgotten: sent before the abort arrived
                            answer.deltas.append(delta)
                            answer.finish = delta.finish or answer.finish

    def collect(self, seconds: float = 60.0) -> None:
        """Until every request has an end, and all before it."""
        deadline = time.monotonic() + seconds
        while not all(answer.whole for answer in self.answers.values()):
            self.turn()
            assert time.monotonic() < deadline, {k: a for k, a in self.answers.items() if not a.whole}
            time.sleep(0.001)

    def __enter__(self) -> RouterDouble:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for link in self._links.values():
            link.close()
        self._context.term()
