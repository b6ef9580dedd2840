"""The process shell that both workers share: one thread that receives, decides, computes a step and answers.

    receive bus messages -> role.handle -> role.tick -> engine.step -> role.stepped -> answers, prefix index, load

Where the executor runs ahead, a turn submits a step, or reads an older one: all else in a turn, answers included, is
done while the newer one computes. The loop never sleeps while a result is due, and never waits for one without
listening: a step with prompts can take 0.2 s, and a ticket, a copy that is complete or a new request is not to wait.

A `Role` is what makes a worker a prefill or a decode worker. Redis and page copying have threads of their own; they and
the status pages wake this loop through an eventfd.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec
import zmq

from penstock.common.bus import BusServer, Peers
from penstock.common.messages import (
    AnyMessage,
    Drain,
    Finish,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    WorkerInfo,
    WorkerLoad,
)
from penstock.common.redis_state import RegistryWriter
from penstock.engine.build import BuiltEngine
from penstock.engine.outputs import StepOutput
from penstock.engine.replies import Replies
from penstock.engine.step_watch import StepWatch

logger = logging.getLogger(__name__)
IDLE_POLL_S = 0.1
AWAITED_POLL_S = 0.005  # a step is under way: its end wakes the loop, and should that come late, this does
BLOCKED_POLL_S = 0.005  # work waits, but for pages that others hold
LOAD_EVERY_S = 0.02  # how old the load may be that is told while steps run
SWEEP_EVERY_S = 1.0  # takes a microsecond a holder


class Role(Protocol):
    """What a worker does with messages and with what its engine computed. Called in the loop's thread only."""

    def handle(self, identity: bytes, message: AnyMessage, now: float) -> None:
        """A message of an accepted peer."""

    def peer_gone(self, identity: bytes) -> None:
        """Everything this peer asked for or was lent has to end."""

    def tick(self, now: float) -> None:
        """Once per turn, before the step: completions, deadlines, admission."""

    def stepped(self, output: StepOutput, now: float) -> None:
        """The engine computed a step."""

    def busy(self) -> bool:
        """Whether requests, loans or copies are still open, besides what the engine holds."""

    def give_up(self, finish: Finish) -> None:
        """End every open request with `finish`; the process is about to leave."""

    def holders(self) -> set[str]:
        """For whom it holds pages, besides what the engine has."""

    def load(self) -> dict[str, int]:
        """The role's own fields of `WorkerLoad`."""

    def histograms(self) -> dict[str, list[float]]:
        """The role's own entries of `WorkerLoad.histograms`."""

    def transports(self) -> dict[str, str]:
        """The role's `WorkerLoad.transports`."""

    def ledger(self) -> dict[str, Any]:
        """The role's part of /debug/ledger."""

    def close(self) -> bool:
        """Give back threads and sockets. False: a copy is still in flight, the process may only leave by `os._exit`."""


class WorkerLoop:
    """Runs one worker until it is told to stop; `wake` may be called from any thread."""

    def __init__(self, built: BuiltEngine, bus: BusServer, info: WorkerInfo, *, lease_s: float, drain_s: float) -> None:
        self.built = built
        self.engine = built.engine
        self.bus = bus
        self.info = info
        self.peers = Peers(info, lease_s)
        self.replies = Replies(bus.send)
        self.load = WorkerLoad(num_pages=self.engine.pages.num_pages)
        self.poller = zmq.Poller()
        self.poller.register(bus.socket, zmq.POLLIN)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.poller.register(self._wake_fd, zmq.POLLIN)
        self._step_watch = StepWatch(self.wake)
        self._questions: queue.SimpleQueue[tuple[Callable[[], dict[str, Any]], Future[dict[str, Any]]]]
        self._questions = queue.SimpleQueue()
        self._drain_s = drain_s
        self._stop_by: float | None = None
        self._stop_requested = threading.Event()
        self._turned_at = time.monotonic()
        self._load_at = self._turned_at
        self._sweep_at = self._turned_at
        self._forgotten: dict[str, int] = {}

    # ------------------------------------------------------------ from other threads

    def wake(self) -> None:
        """End the loop's sleep."""
        os.eventfd_write(self._wake_fd, 1)

    def request_stop(self) -> None:
        """Drain: refuse new requests, let what runs move to others or end for up to drain_s, then leave `run`."""
        self._stop_requested.set()
        self.wake()

    def ask(self, question: Callable[[], dict[str, Any]], timeout_s: float = 15.0) -> dict[str, Any]:
        """Run `question` in the loop's thread, between two steps.

        Raises:
            TimeoutError: the loop did not come by in time.
        """
        future: Future[dict[str, Any]] = Future()
        self._questions.put((question, future))
        self.wake()
        return future.result(timeout_s)

    def health(self) -> tuple[bool, str]:
        """Alive means that the loop turns; a long step is not an illness before a minute."""
        since_s = time.monotonic() - self._turned_at
        return since_s < 60.0, f"last turn of the loop {since_s:.1f} s ago"

    # ------------------------------------------------------------ the loop

    def run(self, role: Role, registry: RegistryWriter | None) -> None:
        """Serve until stopped. Raises what a step raises, after telling the routers to try elsewhere."""
        timeout_s = 0.0
        try:
            while not self._finished(role):
                for fd, _ in self.poller.poll(round(timeout_s * 1e3)):
                    if fd == self._wake_fd:
                        os.eventfd_read(self._wake_fd)
                received = self.bus.receive()
                now = self._turned_at = time.monotonic()  # when all of it had been sent: leases are not cut short
                self._receive(role, received, now)
                role.tick(now)
                timeout_s = self._step(role)
                self.replies.flush()
                self._publish(role, registry)
        except BaseException:
            role.give_up(Finish(reason="error", code="internal_error", message="the worker failed", retryable=True))
            self.replies.flush()
            raise
        for identity in self.peers:
            self.bus.send(identity, Goodbye())

    def _step(self, role: Role) -> float:
        """What the engine can do without waiting for the device; for how long the loop may sleep then."""
        if self.engine.has_work():
            output = self.engine.step_if_done()
            if output is None:
                self._step_watch.watch(self.engine.awaited)
                return AWAITED_POLL_S
            role.stepped(output, time.monotonic())
            if not self.engine.stalled:
                return 0.0
        return BLOCKED_POLL_S if self.engine.has_work() else IDLE_POLL_S

    def close(self) -> None:
        """After the role's end; the engine is closed later."""
        self._step_watch.close()
        self.poller.unregister(self._wake_fd)
        os.close(self._wake_fd)

    def _receive(self, role: Role, received: list[tuple[bytes, AnyMessage]], now: float) -> None:
        for identity, message in received:
            if isinstance(message, Hello):
                answer, events = self.peers.hello(identity, message, now)
                for event in events:
                    if event.identity != identity:
                        role.peer_gone(event.identity)
                self.bus.send(identity, answer)
            elif identity not in self.peers:
                self.bus.send(identity, Peers.unknown())
            elif isinstance(message, Heartbeat):
                self.peers.heartbeat(identity, now)
                self.bus.send(identity, HeartbeatAck(seq=message.seq, load=self.load))
            elif isinstance(message, Goodbye):
                logger.info("peer %s has left", self.peers.left(identity))
                role.peer_gone(identity)
            elif isinstance(message, Drain):
                logger.info("told to drain by %s", identity.decode())
                self.request_stop()
            else:
                role.handle(identity, message, now)
        for expired in self.peers.expire(now):
            logger.warning("peer %s was silent for a lease: its requests and loans end", expired.peer_id)
            role.peer_gone(expired.identity)

    def _publish(self, role: Role, registry: RegistryWriter | None) -> None:
        added, removed = self.engine.pages.drain_events()
        if registry is not None and (added or removed):
            registry.publish(added, removed)
        if self._turned_at >= self._sweep_at:
            self._sweep(role)
        if self._turned_at - self._load_at >= LOAD_EVERY_S or not self.engine.has_work():
            self.load, self._load_at = self._current_load(role, registry), self._turned_at
        while not self._questions.empty():
            question, future = self._questions.get()
            try:
                future.set_result(question())
            except Exception as error:  # handed to the thread that asked
                future.set_exception(error)

    def _sweep(self, role: Role) -> None:
        """Prove that somebody knows of every page that is held, and will give it back. They stay held: who knows who
        still writes into a page that nobody should have."""
        self._sweep_at = self._turned_at + SWEEP_EVERY_S
        found = self.engine.pages.forgotten(self.engine.scheduler.holders() | role.holders())
        if found.keys() - self._forgotten.keys():
            logger.error("pages are held for nobody: %s", found)
        self._forgotten = found

    def _current_load(self, role: Role, registry: RegistryWriter | None) -> WorkerLoad:
        scheduler, pages = self.engine.scheduler, self.engine.pages
        counters = scheduler.counters
        fields = {
            "waiting": len(scheduler.waiting),
            "queued_tokens": scheduler.queued_tokens,
            "prefix_queries": counters.prefix_queries,
            "prefix_hits": counters.prefix_hits,
            "cached_tokens": counters.prefix_hits,
        }
        for name, value in role.load().items():
            fields[name] = fields.get(name, 0) + value
        return WorkerLoad(
            running=len(scheduler.running),
            num_pages=pages.num_pages,
            free_pages=pages.num_available,
            promised_pages=pages.num_promised,
            forgotten_pages=sum(self._forgotten.values()),
            draining=self.peers.draining,
            registered=registry is not None and registry.connected,
            steps=self.engine.steps,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            preemptions=counters.preemptions,
            rates=self.engine.rates.rates(),
            transports=role.transports(),
            histograms={"step_tokens": counters.step_tokens.packed(), **role.histograms()},
            **fields,
            **(registry.index_load() if registry is not None else {}),
        )

    def ledger(self, role: Role) -> dict[str, Any]:
        """Everything this worker holds for anybody; all zero when idle. For /debug/ledger."""
        self.engine.pages.check()
        self._sweep(role)
        return {
            "worker_id": self.info.worker_id,
            "incarnation": self.info.incarnation,
            "running": len(self.engine.scheduler.running),
            "waiting": len(self.engine.scheduler.waiting),
            "held_pages": self.engine.pages.num_held,
            "promised_pages": self.engine.pages.num_promised,
            "peers": len(self.peers),
            "forgotten": self._forgotten,
            "leases": self.peers.leases(time.monotonic()),
            "holders": self.engine.pages.holders(),  # holder -> its pages, each with its generation
            **role.ledger(),
        }

    def _finished(self, role: Role) -> bool:
        if not self._stop_requested.is_set():
            return False
        now = time.monotonic()
        if self._stop_by is None:
            self._stop_by = now + self._drain_s
            self.peers.draining = True
            self.load = msgspec.structs.replace(self.load, draining=True)
            for router in self.peers.routers():  # now, not with the next heartbeat: what runs here is to move
                self.bus.send(router, HeartbeatAck(seq=0, load=self.load))
            logger.info("draining for up to %.0f s", self._drain_s)
        if not self.engine.has_work() and not role.busy():
            return True
        if now < self._stop_by:
            return False
        role.give_up(Finish(reason="error", code="unavailable", message="the worker shut down", retryable=True))
        self.replies.flush()
        return True


def stop_on_signals(loop: WorkerLoop) -> None:
    """SIGTERM and SIGINT drain; a second one kills, as the default action does."""

    def stop(signum: int, frame: object) -> None:
        signal.signal(signum, signal.SIG_DFL)
        loop.request_stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
