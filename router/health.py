"""Which workers may be used: those that make progress, do not fail, and are no strangers any more. Pure.

A worker is
    starting   for `slow_start_s` after it joined: its caches are cold, its rates unknown, its share grows
    up
    stalled    it has requests and no step ends, or it does not answer heartbeats; up again once it does
    broken     its last requests failed, or it was lost, `FAILURES` times in a row: left alone for a back-off
    probing    that back-off is over; one request shows whether it is up

and a pair of prefill and decode worker can be broken although each of them is up with others: hand-offs between them
fail. A worker keeps its breaker over restarts (by worker id); all else belongs to an incarnation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.common.messages import WorkerInfo, WorkerLoad
from penstock.router.breaker import Breaker, Circuit

FAILURES = 3  # in a row, of a worker
PAIR_FAILURES = 2  # each has cost a client time, and there are other pairs
KEPT_S = 600.0  # after its last failure the breaker of a worker that is gone: whoever restarts it has done so by then
UNKNOWN_TIMES = 4  # the stall timeout, for steps of unknown length: the first one may be long on a CPU, or compile
ALIKE = 0.8  # of the warmest one's share, and it counts in full
FIRST_SHARE = 0.1  # of what it would get, to a worker that has just joined

Pair = tuple[str, str]  # incarnations of a prefill and a decode worker


@dataclass(frozen=True)
class WorkerState:
    """What people are told: one of the words above, and why."""

    state: str
    reason: str = ""


@dataclass
class _Member:
    worker: WorkerInfo
    joined_at: float
    heard_at: float
    progress_at: float
    load: WorkerLoad = field(default_factory=WorkerLoad)
    stalled: str = ""  # why it counts as stalled
    credit: float = 1.0  # of a share: 1 is one choice


class Health:
    """Of one router's fleet."""

    def __init__(self, slow_start_s: float = 0.0, stall_timeout_s: float = 30.0) -> None:
        self._slow_start_s = slow_start_s
        self._stall_timeout_s = stall_timeout_s
        self._members: dict[str, _Member] = {}  # by incarnation
        self._breakers: dict[str, Breaker] = {}  # by worker id: only of those that have failed
        self._pairs: dict[Pair, Breaker] = {}  # only of those that have failed
        self.counters = {"workers_stalled": 0, "workers_broken": 0, "pairs_broken": 0}

    # ------------------------------------------------------------ what happens

    def joined(self, worker: WorkerInfo, now: float) -> None:
        """Its link is up."""
        self._members[worker.incarnation] = _Member(worker, now, now, now)

    def lost(self, incarnation: str, now: float) -> None:
        """Its link is down, without a Goodbye: a failure."""
        self._fail(self._members[incarnation].worker, "it was lost", now)
        self.left(incarnation)

    def left(self, incarnation: str) -> None:
        """It has gone."""
        del self._members[incarnation]
        for pair in [pair for pair in self._pairs if incarnation in pair]:
            del self._pairs[pair]

    def reported(self, incarnation: str, load: WorkerLoad, now: float) -> None:
        """A heartbeat was answered."""
        member = self._members[incarnation]
        if load.steps != member.load.steps or not (_has_work(load) and _has_work(member.load)):
            member.progress_at = now
        member.heard_at, member.load = now, load

    def began(self, decode: str, prefill: str | None, now: float) -> None:
        """A request was sent to these."""
        for incarnation in (decode, prefill):
            member = self._members.get(incarnation) if incarnation else None
            breaker = self._breakers.get(member.worker.worker_id) if member else None
            if breaker is not None:
                breaker.began(now)
        if prefill is not None and (prefill, decode) in self._pairs:
            self._pairs[prefill, decode].began(now)

    def failed(self, incarnation: str, reason: str, now: float) -> None:
        """A request failed at this worker, by the worker's fault."""
        if incarnation in self._members:
            self._fail(self._members[incarnation].worker, reason, now)

    def served(self, decode: str, prefill: str | None, handed_off: bool | None, now: float) -> None:
        """A request was served; `handed_off`: how the hand-off between these fared, None: there was none."""
        for incarnation in (decode, prefill if handed_off else None):
            if incarnation in self._members:
                self._breakers.pop(self._members[incarnation].worker.worker_id, None)
        if prefill is None or handed_off is None or not {prefill, decode} <= self._members.keys():
            return
        if handed_off:
            self._pairs.pop((prefill, decode), None)
        elif self._pairs.setdefault((prefill, decode), Breaker(PAIR_FAILURES)).failed("hand-offs fail", now):
            self.counters["pairs_broken"] += 1

    def tick(self, now: float, slack_s: Callable[[str], float | None] = lambda _: 0.0) -> list[tuple[WorkerInfo, str]]:
        """Time passes: workers that have just become stalled, and why. `slack_s`: how long a step of one may take;
        None: nobody knows yet."""
        self._forget(now)
        found = []
        for incarnation, member in self._members.items():
            slack = slack_s(incarnation)
            limit_s = self._stall_timeout_s * UNKNOWN_TIMES if slack is None else self._stall_timeout_s + slack
            before, member.stalled = member.stalled, ""
            if now - member.heard_at > limit_s:
                member.stalled = f"no answer for {limit_s:.0f} s"
            elif now - member.progress_at > limit_s:
                member.stalled = f"no step for {limit_s:.0f} s"
            if member.stalled and not before:
                self.counters["workers_stalled"] += 1
                found.append((member.worker, member.stalled))
        return found

    # ------------------------------------------------------------ what follows

    def usable(self, incarnation: str, now: float) -> bool:
        """It may be sent requests."""
        member = self._members[incarnation]
        breaker = self._breakers.get(member.worker.worker_id)
        return not member.stalled and (breaker is None or breaker.allows(now))

    def choosable(self, incarnations: list[str], now: float) -> list[str]:
        """Of usable workers of one role those that may be chosen this time: a starting one not every time.

        Its share is taken against the warmest of them: where all have just started, all count in full.
        """
        shares = {one: self._warmth(self._members[one], now) for one in incarnations}
        most = max(shares.values(), default=1.0)
        chosen = []
        for incarnation, share in shares.items():
            member = self._members[incarnation]
            member.credit = min(1.0, member.credit + share / most) if share < ALIKE * most else 1.0
            if member.credit >= 1.0:
                member.credit -= 1.0
                chosen.append(incarnation)
        return chosen

    def bad_pairs(self, now: float) -> frozenset[Pair]:
        """Pairs (prefill, decode) between which nothing must be handed off now."""
        return frozenset(pair for pair, breaker in self._pairs.items() if not breaker.allows(now))

    def state(self, incarnation: str, now: float) -> WorkerState:
        """Of one worker."""
        member = self._members[incarnation]
        breaker = self._breakers.get(member.worker.worker_id)
        if member.stalled:
            return WorkerState("stalled", member.stalled)
        circuit = breaker.state(now) if breaker else Circuit.CLOSED
        if breaker is not None and circuit is not Circuit.CLOSED:
            reason = breaker.reason
            if circuit is Circuit.HALF_OPEN:
                return WorkerState("probing", reason)
            return WorkerState("broken", f"{reason}; next try in {breaker.retry_in_s(now):.0f} s")
        return WorkerState("starting") if self._warmth(member, now) < 1.0 else WorkerState("up")

    def broken_pairs(self, now: float) -> list[tuple[WorkerInfo, WorkerInfo, float]]:
        """Pairs whose circuit is not closed: prefill worker, decode worker, seconds until the next try."""
        return [
            (self._members[prefill].worker, self._members[decode].worker, breaker.retry_in_s(now))
            for (prefill, decode), breaker in self._pairs.items()
            if breaker.state(now) is not Circuit.CLOSED
        ]

    def _forget(self, now: float) -> None:
        """Workers that are named anew at each start would leave a breaker each."""
        there = {member.worker.worker_id for member in self._members.values()}
        for worker_id, breaker in list(self._breakers.items()):
            if worker_id not in there and now - breaker.failed_at > KEPT_S:
                del self._breakers[worker_id]

    def _warmth(self, member: _Member, now: float) -> float:
        """From `FIRST_SHARE` to 1 in `slow_start_s`."""
        if now - member.joined_at >= self._slow_start_s:
            return 1.0
        return FIRST_SHARE + (1.0 - FIRST_SHARE) * max(0.0, now - member.joined_at) / self._slow_start_s

    def _fail(self, worker: WorkerInfo, reason: str, now: float) -> None:
        breaker = self._breakers.setdefault(worker.worker_id, Breaker(FAILURES))
        if breaker.failed(reason, now):
            self.counters["workers_broken"] += 1


def _has_work(load: WorkerLoad) -> bool:
    """A step is due: it runs something, or has prompts to compute and waits for nobody else's pages."""
    return load.running > 0 or (load.queued_tokens > 0 and not load.deferred)
