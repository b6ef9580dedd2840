"""Runs the processes of a fleet: the shell around supervisor.py, in a thread of its own.

The thread takes events (an exit, a stop, time) from a queue, asks the `Supervisor` and does what it says. It starts
every child itself, because children die with the thread that started them (die_with_parent.py).
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Thread

from penstock.child_process import ChildProcess, ProcessSpec
from penstock.common.logs import ERROR_PREFIX, parse_progress
from penstock.console import Console
from penstock.supervisor import Command, Kill, Start, State, Supervisor, Terminate

READY_POLL_S = 0.2
LONGEST_WAIT_S = 3600.0  # queues refuse to wait for ever, or for 300 years, which a drain may be given
_NOT_STARTED = 127  # as a shell says of a command it cannot run

logger = logging.getLogger(__name__)


class LaunchError(Exception):
    """A process ended before it had ever been ready; `exit_status` is what the whole launch should exit with."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class ProcessGroup:
    """Processes that are started, restarted and stopped together. Nothing runs before `start`.

    All methods may be called from any thread; `stop` and `kill` from a signal handler as well.
    """

    def __init__(self, specs: Sequence[ProcessSpec], console: Console) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._console = console
        self._supervisor = Supervisor([spec.member for spec in specs])
        self._children: dict[str, ChildProcess] = {}  # running ones, and the last of each that exited
        self._events: SimpleQueue[Callable[[float], list[Command]]] = SimpleQueue()
        self._settled = Event()  # ready for the first time, or never going to be
        self._done = Event()
        self.error: Exception | None = None  # of our own, not of a process: it was logged, and everything killed
        self._thread = Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin to start the processes; `wait_ready` tells when that is done."""
        self._thread.start()

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until every process has been ready.

        Raises:
            LaunchError: a process ended before, or the group was stopped; the message has the process's own words. Or
                the group itself failed.
            TimeoutError: not ready in time; the group goes on starting.
        """
        if not self._settled.wait(timeout_s):
            waiting = ", ".join(self._supervisor.in_state(State.PENDING, State.STARTING, State.BACKING_OFF))
            raise TimeoutError(f"not ready after {timeout_s:g} s: {waiting}")
        failure = self._supervisor.failure
        if failure is not None:
            words = _last_words(self._children.get(failure.name))
            message = f"{failure.name} did not start ({_describe(failure.status)}): {words}"
            raise LaunchError(message, exit_status=2 if failure.status == 2 else 1)
        if self.error is not None:
            message = f"the supervisor failed: {type(self.error).__name__}: {self.error}"
            raise LaunchError(message, exit_status=1) from self.error
        if not self.ready and (self.stopping or self._done.is_set()):
            raise LaunchError("stopped before everything was ready", exit_status=0)

    @property
    def ready(self) -> bool:
        """Every process is ready now."""
        return self._supervisor.ready and not self._done.is_set()

    @property
    def stopping(self) -> bool:
        """Somebody asked to stop, or the launch failed."""
        return self._supervisor.stopping

    @property
    def killed(self) -> bool:
        """It was stopped without a drain."""
        return self._supervisor.killed

    def pids(self) -> dict[str, int]:
        """Process ids of what runs, by name."""
        return {name: self._children[name].pid for name in self._supervisor.in_state(State.STARTING, State.READY)}

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process, as tests and chaos do; the group then does what it does about a death."""
        self._children[name].send(number)

    def stop(self) -> None:
        """Begin to stop in order, draining. Returns at once: see `join`."""
        self._events.put(self._supervisor.stop)

    def kill(self) -> None:
        """End everything now. Returns at once: see `join`."""
        self._events.put(self._supervisor.kill)

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing runs any more; False if that takes longer than `timeout_s`. Then `error` tells whether
        it was meant to."""
        return self._thread.ident is None or self._done.wait(timeout_s)

    def _run(self) -> None:
        try:
            self._supervise()
        except Exception as error:
            logger.exception("the supervisor failed: everything is killed")
            self.error = error
        finally:
            for child in self._children.values():  # only after an error of our own is anything left to kill
                child.kill()
                child.join()
            self._console.close()
            self._done.set()
            self._settled.set()  # last: who waited for it looks at all of the above

    def _supervise(self) -> None:
        self._obey(self._supervisor.start(time.monotonic()))
        while not self._supervisor.done:
            event = self._next_event()
            self._obey(event(time.monotonic()))
            self._probe()
            self._obey(self._supervisor.tick(time.monotonic()))
            if self._supervisor.ready or self._supervisor.stopping:
                self._settled.set()

    def _next_event(self) -> Callable[[float], list[Command]]:
        deadline = self._supervisor.next_deadline()
        patience = None if deadline is None else min(LONGEST_WAIT_S, max(0.0, deadline - time.monotonic()))
        if self._supervisor.in_state(State.STARTING) and not self._supervisor.stopping:
            patience = READY_POLL_S if patience is None else min(READY_POLL_S, patience)
        try:
            return self._events.get(timeout=patience)
        except Empty:
            return self._supervisor.tick

    def _probe(self) -> None:
        if self._supervisor.stopping:
            return
        for name in self._supervisor.in_state(State.STARTING):
            child = self._children.get(name)
            if child is not None and self._specs[name].ready(child.pid):
                self._console.forget(name)
                self._obey(self._supervisor.process_ready(name, time.monotonic()))

    def _obey(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Start(name):
                    self._start(self._specs[name])
                case Terminate(name):
                    self._children[name].send(signal.SIGTERM)
                case Kill(name):
                    self._children[name].kill()

    def _start(self, spec: ProcessSpec) -> None:
        try:
            child = ChildProcess(spec, partial(self._show, spec), partial(self._exited, spec.name))
        except OSError as error:
            self._console.line(spec.name, f"cannot be started: {error}")
            self._exited(spec.name, _NOT_STARTED)
            return
        self._children[spec.name] = child

    def _show(self, spec: ProcessSpec, line: str) -> None:
        progress = parse_progress(line)
        if progress is not None:
            self._console.progress(spec.name, progress)
        elif not spec.quiet:
            self._console.line(spec.name, line)

    def _exited(self, name: str, status: int) -> None:
        self._events.put(partial(self._note_exit, name, status))

    def _note_exit(self, name: str, status: int, now: float) -> list[Command]:
        self._console.forget(name)
        commands = self._supervisor.process_exited(name, status, now)
        if not self._supervisor.stopping and status == 0:  # a worker that was drained
            logger.info("%s has left and will be started again", name)
        elif not self._supervisor.stopping:
            logger.warning("%s died (%s) and will be started again", name, _describe(status))
        return commands


def _describe(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def _last_words(child: ChildProcess | None) -> str:
    """The error line of a child that ended by itself, else the end of its output."""
    if child is None:
        return "it could not be run"
    lines = [line for line in child.tail if line.strip() and parse_progress(line) is None]
    for line in reversed(lines):
        if line.startswith(ERROR_PREFIX):
            return line.removeprefix(ERROR_PREFIX)
    return lines[-1] if lines else "it printed nothing"
