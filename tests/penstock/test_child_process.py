"""A child's exit is reported once, whoever signals or reaps it when; its output is read on, whoever takes it or not."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from threading import Event

import pytest

from penstock import child_process
from penstock.child_process import ChildProcess, ProcessSpec
from penstock.supervisor import Member

WAIT_S = 60.0


class Child:
    """A child that runs `program`, what it said and how it ended; `at_death` is called while it is a zombie."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        program: str,
        at_death: Callable[[ChildProcess], object] = lambda process: None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self.lines: list[str] = []
        self.statuses: list[int] = []
        started, waitid = Event(), os.waitid

        def wait_twice(*what: int) -> object:
            waitid(*what)
            assert started.wait(WAIT_S)
            at_death(self.process)
            return waitid(*what)

        monkeypatch.setattr(child_process.os, "waitid", wait_twice)
        spec = ProcessSpec(Member("child"), (sys.executable, "-c", program), ready=lambda pid: True)
        self.process = ChildProcess(spec, on_line or self.lines.append, self.statuses.append)
        started.set()

    def end(self) -> list[int]:
        """The statuses that were reported."""
        self.process.join()
        return self.statuses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_that_has_just_died_does_not_hide_its_exit(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    child = Child(monkeypatch, "import sys; sys.exit(7)", at_death=lambda process: process.send(number))
    assert child.end() == [7]


def test_one_that_somebody_else_reaped_has_exited_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch, "import sys; sys.exit(7)", at_death=lambda process: os.waitpid(process.pid, 0))
    assert child.end() == [0]  # nobody knows


def test_nothing_is_sent_to_an_id_that_was_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(monkeypatch, "")
    assert child.end() == [0]
    sent: list[tuple[int, int]] = []
    for name in ("kill", "killpg"):
        monkeypatch.setattr(child_process.os, name, lambda *what: sent.append(what))
    child.process.send(signal.SIGTERM)
    child.process.kill()
    assert sent == []


def test_output_that_nobody_takes_is_read_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def gone(line: str) -> None:
        raise BrokenPipeError(f"nobody sees {line}")

    program = "import time\nfor _ in range(3):\n    print('x' * 100_000, flush=True)\nprint('the last')"
    child = Child(monkeypatch, program, on_line=gone)
    assert child.end() == [0]
    assert [line[:8] for line in child.process.tail] == ["x" * 8] * 3 + ["the last"]
    assert len(caplog.messages) == 4
