"""Decides which processes of a fleet run: start in order, restart with back-off, stop in order. Pure; see fleet.py.

Events come in as method calls with the time `now` (monotonic seconds); what has to be done comes back as a list of
`Start`, `Terminate` and `Kill`. The shell does that and reports each exit exactly once.

A process:  pending -> starting -> ready -> backing_off -> starting ...      (-> stopped, once the fleet stops)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
STEADY_S = 60.0  # a process that was ready for so long begins again with the shortest back-off


class State(Enum):
    """Where one process is."""

    PENDING = "pending"  # not started yet
    STARTING = "starting"  # runs, not ready yet
    READY = "ready"
    BACKING_OFF = "backing_off"  # exited, will be started again
    STOPPED = "stopped"  # exited or never started, and will not be started again


RUNNING = (State.STARTING, State.READY)


@dataclass(frozen=True)
class Member:
    """What the supervisor has to know of a process.

    Processes stop in order of `tier`, highest first; one tier is given `drain_s` before it is killed. A `gate` has to
    be ready before anything of a higher tier starts; otherwise tiers start together.
    """

    name: str
    tier: int = 0
    gate: bool = False
    drain_s: float = 10.0


@dataclass(frozen=True)
class Start:
    """Start this process."""

    name: str


@dataclass(frozen=True)
class Terminate:
    """Ask this process to finish what it has and exit (SIGTERM)."""

    name: str


@dataclass(frozen=True)
class Kill:
    """End this process now (SIGKILL)."""

    name: str


Command = Start | Terminate | Kill


@dataclass(frozen=True)
class Failure:
    """The process whose exit ended the launch; `status` as in `Popen.returncode` (negative: the signal)."""

    name: str
    status: int


@dataclass
class _Process:
    member: Member
    state: State = State.PENDING
    was_ready: bool = False  # in any of its lives
    ready_since: float = 0.0
    start_at: float = 0.0
    next_backoff_s: float = FIRST_BACKOFF_S


class Supervisor:
    """The state of a fleet's processes. `members` have different names."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._processes = {member.name: _Process(member) for member in members}
        self._stopping = False
        self._killing = False
        self._stopping_tier: int | None = None
        self._tier_deadline: float | None = None  # when the tier that stops now is killed
        self.failure: Failure | None = None

    @property
    def ready(self) -> bool:
        """Every process is ready."""
        return all(process.state is State.READY for process in self._processes.values())

    @property
    def done(self) -> bool:
        """The fleet was stopped and nothing runs any more."""
        return self._stopping and all(process.state is State.STOPPED for process in self._processes.values())

    @property
    def stopping(self) -> bool:
        """The fleet was told to stop, or its launch failed."""
        return self._stopping

    @property
    def killed(self) -> bool:
        """Somebody did not want to wait for the drain."""
        return self._killing

    def in_state(self, *states: State) -> list[str]:
        """Names of the processes in these states, in the order given."""
        return [name for name, process in self._processes.items() if process.state in states]

    def start(self, now: float) -> list[Command]:
        """Begin: start what no gate holds back."""
        return self._start_due(now)

    def process_ready(self, name: str, now: float) -> list[Command]:
        """A started process can do its work. Repeating it, or saying it too late, changes nothing."""
        process = self._processes[name]
        if process.state is not State.STARTING:
            return []
        process.state, process.was_ready, process.ready_since = State.READY, True, now
        return self._start_due(now)

    def process_exited(self, name: str, status: int, now: float) -> list[Command]:
        """A started process is gone. One that has never been ready ends the launch; another is started again."""
        process = self._processes[name]
        if process.state not in RUNNING:
            raise RuntimeError(f"{name} exited while {process.state.value}")
        steady = process.state is State.READY and now - process.ready_since >= STEADY_S
        if self._stopping:
            process.state = State.STOPPED
            return self._stop_next(now)
        if not process.was_ready:
            process.state = State.STOPPED
            self.failure = Failure(name, status)
            return self.stop(now)
        if steady:
            process.next_backoff_s = FIRST_BACKOFF_S
        process.state, process.start_at = State.BACKING_OFF, now + process.next_backoff_s
        process.next_backoff_s = min(2 * process.next_backoff_s, LONGEST_BACKOFF_S)
        return []

    def stop(self, now: float) -> list[Command]:
        """Stop the fleet, tier by tier. Called again, it does not change what is under way."""
        if self._stopping:
            return []
        self._stopping = True
        for process in self._processes.values():
            if process.state not in RUNNING:
                process.state = State.STOPPED
        return self._stop_next(now)

    def kill(self, now: float) -> list[Command]:
        """Stop the fleet without waiting for anything."""
        self.stop(now)
        self._killing, self._tier_deadline = True, None
        return [Kill(name) for name in self.in_state(*RUNNING)]

    def tick(self, now: float) -> list[Command]:
        """What time alone brings: a back-off is over, a tier did not stop in time."""
        if not self._stopping:
            return self._start_due(now)
        if self._tier_deadline is None or now < self._tier_deadline:
            return []
        self._tier_deadline = None
        return [Kill(process.member.name) for process in self._lasting_tier()]

    def next_deadline(self) -> float | None:
        """When `tick` next has something to do, if nothing else happens."""
        if self._stopping:
            return self._tier_deadline
        return min((p.start_at for p in self._processes.values() if p.state is State.BACKING_OFF), default=None)

    def _start_due(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for process in self._processes.values():
            pending = process.state is State.PENDING and not self._held_back(process.member)
            again = process.state is State.BACKING_OFF and now >= process.start_at
            if pending or again:
                process.state = State.STARTING
                commands.append(Start(process.member.name))
        return commands

    def _held_back(self, member: Member) -> bool:
        others = self._processes.values()
        return any(o.member.gate and not o.was_ready and o.member.tier < member.tier for o in others)

    def _stop_next(self, now: float) -> list[Command]:
        """Terminate the highest tier that still runs, unless that is under way."""
        lasting = self._lasting_tier()
        if self._killing or not lasting or lasting[0].member.tier == self._stopping_tier:
            return []
        self._stopping_tier = lasting[0].member.tier
        self._tier_deadline = now + max(process.member.drain_s for process in lasting)
        return [Terminate(process.member.name) for process in lasting]

    def _lasting_tier(self) -> list[_Process]:
        running = [process for process in self._processes.values() if process.state in RUNNING]
        highest = max((process.member.tier for process in running), default=0)
        return [process for process in running if process.member.tier == highest]
