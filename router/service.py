"""The router's engine room: joins Redis, the links to the workers, fleet view, policy and dispatcher on one event loop.

The HTTP front calls `submit` and `cancel`; tokens come back through a `Sink`, synchronously, as they arrive. Decisions
are in dispatch.py, placing.py, policy.py and fleet.py; this file carries them out.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from penstock.common.bus import AsyncBusLink, Connected, Disconnected, LinkItem, link_context
from penstock.common.config import RouterConfig
from penstock.common.errors import Overloaded, PenstockError, Unavailable
from penstock.common.hash_probe import mismatch
from penstock.common.histogram import Histogram
from penstock.common.logs import about
from penstock.common.messages import GenerateRequest, HeartbeatAck, TokenBatch, TokenDelta, WorkerInfo, WorkerLoad
from penstock.common.open_files import raise_open_files_limit
from penstock.common.redis_state import FleetReader
from penstock.common.reservations import Reservations
from penstock.common.tasks import end_tasks, take_turns
from penstock.common.text_probe import TextProbe
from penstock.router.dispatch import MAX_WAITING, SHUTTING_DOWN, Dispatcher
from penstock.router.dispatch_events import (
    Blame,
    Cancelled,
    Command,
    Deliver,
    Dequeue,
    Event,
    Fail,
    Give,
    Place,
    Release,
    Reserve,
    SendAbort,
    SendMove,
    SendSubmit,
    Served,
    Shutdown,
    Submitted,
    Tick,
    WorkerAtWork,
    WorkerDown,
    WorkerStalled,
    WorkerUp,
)
from penstock.router.first_worker import FirstWorker
from penstock.router.fleet import Fleet
from penstock.router.health import Health, WorkerState
from penstock.router.hit_check import HitCheck
from penstock.router.off_loop import OffLoop
from penstock.router.placing import Placing
from penstock.router.policies import make_policy
from penstock.router.slices import Slices
from penstock.router.turns import Turns, new_admission
from penstock.router.unfit import Unfit

TICK_S = 0.1
DISCOVER, TICK = "discover", "tick"  # tasks that go on for ever
DISCOVER_S = 0.25  # a worker that has come up is used as soon
DISCOVER_FIRST_S = 0.1  # while no worker is known

_COUNTED = (
    *("requests", "finished", "failed", "token_batches"),
    *("prompts_at_prefill_workers", "prompts_at_decode_workers"),
    "workers_lost",
)

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where the tokens of one choice go. Both are called on the event loop and must not block or raise.

    A sink that cancels from within `on_delta` may still get tokens of the same burst.
    """

    def on_delta(self, delta: TokenDelta) -> None:
        """Next tokens, in order, without gaps or repeats; the last call has `finish`."""

    def on_error(self, error: PenstockError) -> None:
        """The choice ended with an error; nothing follows."""


@dataclass(frozen=True)
class ModelInfo:
    """What the HTTP front has to know of the model to check a request."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    page_size: int


class RouterService:
    """One router process's connection to its fleet. All methods belong to the event loop that ran `start`."""

    def __init__(self, config: RouterConfig, texts: TextProbe | None = None) -> None:
        """`texts`: how this router reads text, which its workers' models must take as it comes."""
        self.router_id = f"router-{uuid.uuid4().hex[:12]}"
        self._config = config
        self._health = Health(config.slow_start_s, max(config.stall_timeout_s, config.lease_s))
        self._fleet = Fleet((*config.served_model_name, config.model), self._health)
        max_waiting = max(MAX_WAITING, config.own_max_queued)
        self._dispatcher = Dispatcher(config.max_attempts, config.progress_timeout_s, max_waiting)
        self._reader = FleetReader(config.redis_url, config.namespace, self.router_id)
        self._reservations = Reservations(config.redis_url, config.namespace, self.router_id, config.lease_s)
        self.off_loop = OffLoop()
        self._admission = new_admission(config)
        self._placing = Placing(
            self._fleet,
            make_policy(config.routing_policy, fetch=config.fetch_prefixes),
            self._reader,
            self._reservations,
            self.off_loop,
            config.min_remote_prefill_tokens,
            self._admission.limits,
        )
        self._context = link_context()
        self._links: dict[str, AsyncBusLink] = {}  # by address
        self._addresses: dict[str, str] = {}  # incarnation of a live worker -> address
        self._tasks: set[asyncio.Task[None]] = set()
        self._to_tell: Slices[Deliver | Fail] = Slices(self._tell)
        self._unfit = Unfit()
        self._texts = texts or TextProbe()
        self._counters = Counter(dict.fromkeys(_COUNTED, 0))
        self._hits = HitCheck()
        self._turns = Turns(self._placing, self._fleet, self._hits, self._admission, self._handle, self._spawn)
        self._model: ModelInfo | None = None
        self.first_worker = FirstWorker(config.queue_timeout_s)
        self._accepting = False
        self._ended = ""  # the name of a task that should have gone on until `stop`

    async def start(self) -> None:
        """Connect. Returns at once; `ready` tells when a worker has been found."""
        self._accepting = True
        raise_open_files_limit()
        self._reservations.start()
        self._spawn(take_turns(self._discover, self._discover_pause_s, log), DISCOVER)
        self._spawn(take_turns(self._tick, lambda: TICK_S, log), TICK)

    async def stop(self, drain_s: float) -> None:
        """Refuse new requests, wait for those under way, end the rest with `Unavailable`, close everything, once."""
        self._accepting = False
        if self._context.closed:
            return
        self.first_worker.refuse(SHUTTING_DOWN)
        deadline = time.monotonic() + drain_s
        while self._dispatcher.choices and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._handle(Shutdown())
        while self._to_tell:
            await asyncio.sleep(0)
        await end_tasks(self._tasks)
        await self._reservations.close()
        await self._reader.close()
        for link in self._links.values():
            link.close()
        self._links.clear()
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)
        self.off_loop.close()

    async def submit(self, request: GenerateRequest, sink: Sink, tenant: str = "") -> None:
        """Take one choice. Every end of it, a refusal included, goes to `sink`. `tenant`: whose share it uses."""
        if not self._accepting:
            sink.on_error(Unavailable(SHUTTING_DOWN))
            return
        limit = self._config.own_max_inflight
        if len(self._dispatcher.choices) >= limit:
            self._admission.refused["in_flight"] += 1
            sink.on_error(Overloaded(f"this router process has {limit} choices in flight, its limit"))
            return
        self._counters["requests"] += 1
        self._handle(Submitted(request, sink, tenant))

    def cancel(self, request_id: str, choice: int) -> None:
        """The client does not want it any more: its worker frees it after the next step. Unknown ids do nothing."""
        self._handle(Cancelled(request_id, choice))

    def model_info(self) -> ModelInfo | None:
        """The model as its workers describe it; None until one was seen."""
        return self._model

    def why_not_ready(self) -> str:
        """What to tell who asks while it is not `ready`."""
        if self._ended:
            return f"its task {self._ended} has ended: start it again"
        if self._model is not None:
            return "no decode worker takes requests"
        if self._unfit:
            return "no worker fits this router: its log says why"
        return "no worker is known yet"

    def ready(self) -> bool:
        """At least one decode worker is alive, and so is this router."""
        return not self._ended and bool(self._fleet.live("decode"))

    def loads(self) -> list[tuple[WorkerInfo, WorkerLoad]]:
        """Live workers, and what each said last of itself."""
        return [(member.worker, member.load) for member in self._fleet.members]

    def states(self) -> dict[str, WorkerState]:
        """How each live worker is, by incarnation."""
        now = time.monotonic()
        return {m.worker.incarnation: self._health.state(m.worker.incarnation, now) for m in self._fleet.members}

    def broken_pairs(self) -> list[tuple[str, str, float]]:
        """Pairs between which nothing is handed off: ids of prefill and decode worker, seconds until the next try."""
        pairs = self._health.broken_pairs(time.monotonic())
        return [(prefill.worker_id, decode.worker_id, retry_in_s) for prefill, decode, retry_in_s in pairs]

    def counters(self) -> dict[str, int]:
        """Totals since the start, and gauges (`in_flight`, `queued`, `reserved_tokens`, `links`)."""
        return {
            **self._counters,
            **self._unfit.counters,
            **self._hits.counters(),
            **self._health.counters,
            **{f"refused_{reason}": number for reason, number in self._admission.refused.items()},
            "queued": len(self._admission),
            "retries": self._dispatcher.retries,
            "stale_deltas": self._dispatcher.stale_deltas,
            "divergences": self._dispatcher.divergences,
            "moves": self._dispatcher.moves,
            "redis_failures": self._reader.failures,
            "in_flight": len(self._dispatcher.choices),
            "reserved_tokens": sum(self._fleet.reservations.values()),
            "links": len(self._links),
            "redis_up": int(not self._reader.away),
        }

    def histograms(self) -> dict[str, Histogram]:
        """Durations, for metrics."""
        return {"index_lookup_seconds": self._reader.lookup_s}

    # ------------------------------------------------------------ dispatcher in, commands out

    def _handle(self, event: Event) -> None:
        self._carry_out(self._dispatcher.handle(event, time.monotonic()))

    def _carry_out(self, commands: Sequence[Command]) -> None:
        told = [command for command in commands if type(command) is Deliver or type(command) is Fail]
        if told:  # nearly all of them are
            self._to_tell.extend(told)
            if len(told) == len(commands):
                return
        for command in commands:
            if isinstance(command, Place):
                if command.lost:
                    level = logging.INFO if command.worker_leaves else logging.WARNING
                    log.log(level, "trying again: %s", command.lost, extra=about(command.request))
                self._spawn(self._turns.place(command), f"place {command.request.request_id}")
            elif isinstance(command, Dequeue):
                self._turns.forget((command.request_id, command.choice))
            elif isinstance(command, (SendSubmit, SendAbort, SendMove)):
                address = self._addresses.get(command.incarnation)
                if address is not None:  # else its WorkerDown was just handled
                    self._links[address].send(command.message)
                    if isinstance(command, SendSubmit):
                        role = "decode" if command.message.prefill is None else "prefill"
                        self._counters[f"prompts_at_{role}_workers"] += 1
            elif isinstance(command, Served):
                self._health.served(command.decode, command.prefill, command.handed_off, time.monotonic())
            elif isinstance(command, Blame):
                self._health.failed(command.incarnation, command.reason, time.monotonic())
            elif isinstance(command, Reserve):
                self._placing.reserve(command.incarnation, command.tokens, prompt=command.prompt)
            elif isinstance(command, Release):
                self._placing.release(command.incarnation, command.tokens, prompt=command.prompt)
                self._turns.take()
            elif isinstance(command, Give):
                self._fleet.give_more(command.incarnation, command.work_ms)

    def _tell(self, command: Deliver | Fail) -> None:
        if type(command) is Fail:  # a struct's `isinstance` takes as long as the rest of this
            self._counters["failed"] += 1
            try:
                command.sink.on_error(command.error)
            except Exception:
                log.exception("the sink of a request failed")
            return
        assert type(command) is Deliver
        delta = command.delta
        if delta.spans is not None:
            key = delta.request_id, delta.choice
            warning = self._hits.reported(key, delta.attempt, delta.spans, time.monotonic())
            if warning:
                log.warning("%s", warning)
        try:
            command.sink.on_delta(delta)
        except Exception:  # one client's bug must not cost the others of this step their tokens
            log.exception("the sink of a request failed", extra=about(delta))
            self._handle(Cancelled(delta.request_id, delta.choice))
        if delta.finish is not None:
            self._counters["finished"] += 1

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.get_name() in (DISCOVER, TICK):
            self._ended = task.get_name()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task %r failed", task.get_name(), exc_info=error)

    # ------------------------------------------------------------ fleet

    async def _discover(self) -> None:
        workers = await self._reader.workers()
        if workers is None:
            return
        changes = self._fleet.discovered(workers)
        self._fleet.measure()
        for address in changes.opened:
            self._open_link(address)
        for address in changes.forgotten:
            self._links.pop(address).close()
            self._unfit.forget(address)

    def _discover_pause_s(self) -> float:
        return DISCOVER_S if self._fleet.members else DISCOVER_FIRST_S

    async def _tick(self) -> None:
        for link in list(self._links.values()):
            link.tick()
        for address, worker in self._fleet.acceptable(time.monotonic()):
            self._on_connected(address, worker)
        self._handle(Tick())
        if not self._to_tell:  # else reports of some that have ended are still to come
            self._hits.keep(self._dispatcher.choices)
        self._look_for_stalled()
        self._turns.take()

    def _look_for_stalled(self) -> None:
        now = time.monotonic()
        for worker, reason in self._fleet.stalled(now):
            log.warning("worker %s (%s) makes no progress: %s", worker.worker_id, worker.role, reason)
            if self._fleet.has_other(worker.incarnation, now):
                self._handle(WorkerStalled(worker.incarnation, reason))

    def _open_link(self, address: str) -> None:
        # Sessions of one peer must grow at the worker, also over links that were given up between.
        session = time.time_ns() // 1_000_000
        self._links[address] = AsyncBusLink(
            address,
            self.router_id,
            "router",
            session,
            "",
            self._config.cluster_key,
            self._context,
            handler=functools.partial(self._on_item, address),
            lease_s=self._config.lease_s,
        )
        self._links[address].tick()

    def _on_item(self, address: str, item: LinkItem) -> None:
        if type(item) is TokenBatch:
            self._counters["token_batches"] += 1
            self._carry_out(self._dispatcher.tokens(item.deltas, time.monotonic()))
        elif isinstance(item, HeartbeatAck):
            at_work = self._fleet.report(address, item.load, time.monotonic())
            if at_work is not None:
                self._handle(WorkerAtWork(at_work))
            for leaving in self._fleet.leaving(address, time.monotonic(), 1 + self._reader.other_routers):
                self._handle(leaving)
        elif isinstance(item, Connected):
            self._on_connected(address, item.worker)
        elif isinstance(item, Disconnected):
            self._on_disconnected(address, item)

    def _on_connected(self, address: str, worker: WorkerInfo) -> None:
        refusal = mismatch(worker) or self._texts.refusal(worker)
        refusal = refusal or self._fleet.connected(address, worker, time.monotonic())
        if refusal:  # its link stays, so that it can be used once the workers that it does not match are gone
            self._unfit.refuse(address, refusal, worker)
            return
        self._unfit.accept(address)
        log.info("worker %s (%s) at %s is up", worker.worker_id, worker.role, address)
        if warning := self._texts.warning(worker):
            self._unfit.warn(address, worker, warning)
        self._addresses[worker.incarnation] = address
        if worker.role == "decode":
            context = self._fleet.context()
            self._model = ModelInfo(context, worker.vocab_size, tuple(worker.eos_token_ids), worker.page_size)
            if any(other.max_model_len != context for other in self._fleet.live("decode")):
                log.warning("decode workers differ in their context: requests may have %d tokens, the least", context)
            self.first_worker.has_come()
            self._handle(WorkerUp(worker.incarnation))

    def _on_disconnected(self, address: str, item: Disconnected) -> None:
        if item.refused:
            self._unfit.refuse(address, item.reason)
        elif not item.greeted:
            self._unfit.miss(address, item.reason)
        member = self._fleet.disconnected(address, time.monotonic(), left=item.left)
        if member is None:
            return
        worker = member.worker
        if item.left:
            log.info("worker %s (%s) at %s has left", worker.worker_id, worker.role, address)
        else:
            log.warning("worker %s (%s) at %s is lost: %s", worker.worker_id, worker.role, address, item.reason)
            self._counters["workers_lost"] += 1
        if self._addresses.get(worker.incarnation) == address:
            del self._addresses[worker.incarnation]
        if self._model is not None and (context := self._fleet.context()):
            self._model = replace(self._model, max_model_len=context)
        self._handle(WorkerDown(worker.incarnation))
