"""One child process: started so that it dies with us, its output read line by line, its exit reported once.

Used by process_group.py. A child gets its configuration on standard input, so that no secret stands in a command line.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from threading import Lock, Thread

from penstock.supervisor import Member

TAIL_LINES = 50
_LAST_OUTPUT_S = 2.0  # how long a dead child's pipe is read on, should somebody else still hold it
_WRAPPER = Path(__file__).parent / "die_with_parent.py"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessSpec:
    """A process to run: its place in the fleet, its command, and how to know that it can do its work.

    `ready(pid)` is asked again and again from the supervising thread until it is True; it should answer within a second
    or so and not raise. `stdin` may hold secrets.
    """

    member: Member
    command: Sequence[str]
    ready: Callable[[int], bool]
    stdin: str = field(default="", repr=False)
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    quiet: bool = False  # its output is kept for a failure, but not shown

    @property
    def name(self) -> str:
        return self.member.name


class ChildProcess:
    """A running child, from the moment it is constructed.

    Args:
        on_line: called with each line of output (stdout and stderr together), in a thread of the child's own. What it
            raises is logged, and the next line read: a child whose pipe nobody reads dies of it.
        on_exit: called once with the exit status (negative: the signal), after the last line.

    Raises:
        OSError: the process could not be started.
    """

    def __init__(self, spec: ProcessSpec, on_line: Callable[[str], None], on_exit: Callable[[int], None]) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._name = spec.name
        self._on_line = on_line
        self._on_exit = on_exit
        self._reaping = Lock()  # an id that was reaped may be another process's: no signal goes to it
        self._process = Popen(
            [sys.executable, "-I", "-S", str(_WRAPPER), str(os.getpid()), *spec.command],
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            env=dict(spec.environ),
            start_new_session=True,  # Ctrl-C is for the launcher alone: it stops the others in order
            encoding="utf-8",
            errors="replace",
        )
        self._reader = Thread(target=self._read, name=f"{spec.name}-output", daemon=True)
        self._reader.start()
        self._waiter = Thread(target=self._wait, name=f"{spec.name}-exit", daemon=True)
        self._waiter.start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:  # it may have died already
            stdin.write(spec.stdin)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process; nothing happens when it is gone."""
        with self._reaping, suppress(ProcessLookupError):  # Popen's own would reap it, and `_wait` never hear of it
            if self._process.returncode is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process and whatever it started in its session."""
        with self._reaping:
            if self._process.returncode is None:
                _kill_session(self.pid)

    def join(self) -> None:
        """Wait until the exit has been reported."""
        self._waiter.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self.tail.append(line.rstrip("\n"))
                try:
                    self._on_line(line.rstrip("\n"))
                except Exception:
                    logger.exception("a line of %s was not taken", self._name)

    def _wait(self) -> None:
        with suppress(ChildProcessError):  # where our program ignores SIGCHLD, or waits for any child, it is reaped
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            _kill_session(self.pid)  # while it is not reaped, the id cannot belong to anybody else
        with self._reaping:
            status = self._process.wait()
        self._reader.join(_LAST_OUTPUT_S)
        self._on_exit(status)


def _kill_session(leader_pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader_pid, signal.SIGKILL)
