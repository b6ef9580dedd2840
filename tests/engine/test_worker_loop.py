"""The loop's turns over an executor that is late: it sleeps only when nothing is due."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from penstock.common.messages import PROTOCOL_VERSION, Finish, Heartbeat, HeartbeatAck, Hello, Message, Welcome
from penstock.common.peers import wire_identity
from penstock.engine import worker_loop
from penstock.engine.core import Engine
from penstock.engine.outputs import StepOutput
from penstock.engine.pages import PageManager
from penstock.engine.policy import DecodePolicy
from penstock.engine.scheduler import Scheduler
from penstock.engine.step_watch import StepWatch
from penstock.engine.worker_loop import AWAITED_POLL_S, BLOCKED_POLL_S, IDLE_POLL_S, WorkerLoop
from tests.engine.test_run_ahead import LateExecutor, expected_tokens, source
from tests.worker_info import worker_info

PROMPT = [1, 2, 3]
PEER = wire_identity("d", 1)


class Bus:
    """Nobody writes to this worker, unless `turns` says what comes in each of its turns."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.PULL)
        self.turns: list[Callable[[], list[tuple[bytes, Message]]]] = []
        self.sent: list[Message] = []

    def receive(self) -> list[tuple[bytes, Message]]:
        return self.turns.pop(0)() if self.turns else []

    def send(self, identity: bytes, message: Message) -> None:
        assert identity == PEER, f"{message} to nobody"
        self.sent.append(message)

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class OneRequest:
    """A role with one request, from the first turn on; asks the loop to stop when that has ended."""

    def __init__(self, loop: WorkerLoop, **sampling: object) -> None:
        self.loop = loop
        self.source = source("a", PROMPT, **sampling)
        self.events: list[str] = []
        self.tokens: list[int] = []
        self.begun = False

    def tick(self, now: float) -> None:
        self.events.append("tick")
        if not self.begun:
            self.begun = True
            self.loop.engine.add(self.source)

    def stepped(self, output: StepOutput, now: float) -> None:
        for item in output.outputs:
            self.tokens += item.token_ids
            if item.finish is not None:
                self.loop.request_stop()
        self.events.append(f"{len(output.outputs)} outputs")

    def peer_gone(self, identity: bytes) -> None:
        self.events.append(f"{identity.decode()} is gone")
        self.loop.request_stop()

    def busy(self) -> bool:
        return False

    def load(self) -> dict[str, int]:
        return {}

    def holders(self) -> set[str]:
        return {"loan-1"}

    def ledger(self) -> dict[str, Any]:
        return {}

    def transports(self) -> dict[str, str]:
        return {}

    def histograms(self) -> dict[str, list[float]]:
        return {}

    def give_up(self, finish: Finish) -> None:
        raise AssertionError(finish)


class Sleeps:
    """Stands in for the poller: notes how long each turn would sleep at most, and never does."""

    def __init__(self) -> None:
        self.timeouts_ms: list[int] = []
        self.each_time = lambda: None

    def poll(self, timeout_ms: int) -> list[tuple[int, int]]:
        self.timeouts_ms.append(timeout_ms)
        self.each_time()
        return []

    def unregister(self, fd: int) -> None: ...


def make_loop(run_ahead: int, num_pages: int = 16) -> tuple[WorkerLoop, Bus, Sleeps]:
    scheduler = Scheduler(
        PageManager(num_pages, 4),
        DecodePolicy(),
        max_num_seqs=4,
        max_num_batched_tokens=8,
        max_model_len=num_pages * 4,
        hash_scope="test",
    )
    bus: Any = Bus()
    built: Any = SimpleNamespace(engine=Engine(scheduler, LateExecutor(run_ahead)))
    info = worker_info("decode-0", "x")
    loop = WorkerLoop(built, bus, info, lease_s=10.0, drain_s=10.0)
    sleeps: Any = Sleeps()
    loop.poller = sleeps
    return loop, bus, sleeps


def test_pages_that_are_held_for_nobody_are_found(caplog: pytest.LogCaptureFixture) -> None:
    loop, bus, sleeps = make_loop(2)
    pages = loop.engine.pages
    pages.allocate("loan-1", 1)  # the role knows that one
    role: Any = OneRequest(loop, max_tokens=6)
    seen = []

    def each_time() -> None:
        loop._sweep_at = 0.0
        seen.append((loop.load.forgotten_pages, len(loop.engine.scheduler.holders())))
        if len(seen) == 4:
            assert max(holders for _, holders in seen) == 3, "a request, and steps in flight"
            pages.allocate("nobody", 2)
            pages.promise("nobody", 3)

    sleeps.each_time = each_time
    loop.run(role, None)
    assert [number for number, _ in seen[:4]] == [0] * 4 and loop.load.forgotten_pages == 5
    assert [record.levelname for record in caplog.records if "held for nobody: {'nobody': 5}" in record.message] == [
        "ERROR"
    ]
    pages.release("nobody")
    assert loop.ledger(role)["forgotten"] == {}
    loop.close()
    bus.close()


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_no_sleep_while_a_result_is_due(run_ahead: int) -> None:
    loop, bus, sleeps = make_loop(run_ahead)
    role: Any = OneRequest(loop, max_tokens=4)
    loop.run(role, None)
    assert role.tokens == expected_tokens(role.source, 64)
    assert set(sleeps.timeouts_ms) == {0}
    assert role.events == ["tick", "0 outputs"] * run_ahead + ["tick", "1 outputs"] * 4
    loop.close()
    bus.close()


def test_the_turn_after_a_late_stop_still_comes() -> None:
    """The step behind the stop is read before the loop ends: nothing is held then."""
    loop, bus, sleeps = make_loop(1)
    first = expected_tokens(source("a", PROMPT), 64)[0]
    role: Any = OneRequest(loop, max_tokens=9, stop_token_ids=[first])
    loop.run(role, None)
    assert role.tokens == [first]
    assert role.events == ["tick", "0 outputs", "tick", "1 outputs", "tick", "0 outputs"]
    assert set(sleeps.timeouts_ms) == {0}
    assert loop.engine.pages.num_held == 0
    loop.close()
    bus.close()


def test_a_short_sleep_while_others_hold_the_pages_and_a_long_one_without_work() -> None:
    loop, bus, sleeps = make_loop(1, num_pages=2)
    loop.engine.pages.allocate("somebody", 2)
    role: Any = OneRequest(loop, max_tokens=1)
    turns = 0

    def each_time() -> None:
        nonlocal turns
        turns += 1
        if turns == 4:
            loop.engine.pages.release("somebody")

    sleeps.each_time = each_time
    loop.run(role, None)
    blocked_ms = round(BLOCKED_POLL_S * 1e3)
    assert sleeps.timeouts_ms[:4] == [0, blocked_ms, blocked_ms, blocked_ms]
    assert set(sleeps.timeouts_ms[4:]) == {0}
    idle, idle_bus, idle_sleeps = make_loop(1)

    def stop_later() -> None:
        if len(idle_sleeps.timeouts_ms) == 3:
            idle.request_stop()

    idle_sleeps.each_time = stop_later
    idle_role: Any = OneRequest(idle)
    idle_role.begun = True
    idle.run(idle_role, None)
    assert idle_sleeps.timeouts_ms == [0, round(IDLE_POLL_S * 1e3), round(IDLE_POLL_S * 1e3)]
    for each, its_bus in ((loop, bus), (idle, idle_bus)):
        each.close()
        its_bus.close()


def test_messages_are_heard_while_a_step_is_under_way() -> None:
    loop, bus, sleeps = make_loop(1)
    executor: Any = loop.engine.executor
    role: Any = OneRequest(loop, max_tokens=3)
    hello = Hello(protocol=PROTOCOL_VERSION, peer_id="d", session=1, role="decode", fingerprint="f")
    bus.turns = [lambda: [], lambda: [], lambda: [(PEER, hello)], lambda: [(PEER, Heartbeat(seq=1))]]

    def each_time() -> None:
        if len(sleeps.timeouts_ms) == 1:
            executor.ended.clear()
        if len(sleeps.timeouts_ms) == 5:
            assert [type(message) for message in bus.sent] == [Welcome, HeartbeatAck]
            assert role.tokens == []
            executor.ended.set()

    sleeps.each_time = each_time
    loop.run(role, None)
    assert role.tokens == expected_tokens(role.source, 64)
    assert sleeps.timeouts_ms[:5] == [0, 0, *[round(AWAITED_POLL_S * 1e3)] * 3]
    assert set(sleeps.timeouts_ms[5:]) == {0}
    loop.close()
    bus.close()


def test_a_steps_end_ends_the_loops_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real poller, with an eventfd behind it, would sleep for a minute."""
    monkeypatch.setattr(worker_loop, "AWAITED_POLL_S", 60.0)
    loop, bus, _ = make_loop(1)
    loop.poller = poller = zmq.Poller()
    poller.register(bus.socket, zmq.POLLIN)
    poller.register(loop._wake_fd, zmq.POLLIN)
    executor: Any = loop.engine.executor
    role: Any = OneRequest(loop, max_tokens=2)
    executor.ended.clear()
    running = threading.Thread(target=loop.run, args=(role, None))
    running.start()
    while loop._step_watch._watched is None:
        time.sleep(0.001)
    executor.ended.set()
    running.join(30.0)
    assert not running.is_alive()
    assert role.tokens == expected_tokens(role.source, 64)
    loop.close()
    bus.close()


def test_a_step_that_fails_wakes_the_loop_too() -> None:
    woken = threading.Semaphore(0)
    watch = StepWatch(woken.release)

    def fail() -> None:
        raise RuntimeError("the device is lost")

    steps: list[Any] = [SimpleNamespace(wait=fail), SimpleNamespace(wait=lambda: None)]
    for step in (steps[0], steps[0], steps[1]):  # asked for again it is waited for once
        watch.watch(step)
    watch.close()
    assert [woken.acquire(blocking=False) for _ in range(3)] == [True, True, False]


def test_a_lease_is_counted_from_no_earlier_than_its_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is stopped just before it looks for messages finds some that were sent meanwhile. Its answer proves
    to the sender a lease from then on."""
    loop, bus, _ = make_loop(0)
    role: Any = OneRequest(loop)
    role.begun = True
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(worker_loop, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def after(seconds: float, *messages: Message) -> Callable[[], list[tuple[bytes, Message]]]:
        def receive() -> list[tuple[bytes, Message]]:
            clock.now += seconds
            return [(PEER, message) for message in messages]

        return receive

    hello = Hello(protocol=PROTOCOL_VERSION, peer_id="d", session=1, role="decode", fingerprint="f")
    bus.turns = [after(0.0, hello), after(30.0, Heartbeat(seq=1)), after(10.0), after(0.1)]
    loop.run(role, None)
    assert [type(message) for message in bus.sent] == [Welcome, HeartbeatAck]
    assert role.events == ["tick"] * 3 + ["d/1 is gone", "tick"]
    loop.close()
    bus.close()
