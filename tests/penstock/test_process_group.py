"""The process group with small real children (`python -c ...`): restarts, order of stopping, failures, nothing left."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from penstock.child_process import ProcessSpec
from penstock.console import Console
from penstock.process_group import LaunchError, ProcessGroup
from penstock.supervisor import Member

pytestmark = pytest.mark.system

DEADLINE_S = 60.0
# Says it is ready by writing its pid to a file; ends on SIGTERM, and tells when.
CHILD = """
import os, pathlib, signal, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
def stop(number, frame):
    with open(folder / "stopped", "a") as log:
        log.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("hello from", name, flush=True)
(folder / name).write_text(str(os.getpid()))
while True:
    time.sleep(0.05)
"""
FAILS = (
    "import sys; print('looking'); print('penstock: error: no config.json in /models/x', file=sys.stderr); sys.exit(2)"
)


def child(folder: Path, name: str, tier: int = 0, program: str = CHILD, drain_s: float = 10.0) -> ProcessSpec:
    def ready(pid: int) -> bool:
        return (folder / name).exists() and (folder / name).read_text() == str(pid)

    member = Member(name, tier=tier, drain_s=drain_s)
    return ProcessSpec(member, (sys.executable, "-c", program, name, str(folder)), ready)


def wait_for(condition: object, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    assert left == []


def test_starts_restarts_and_stops_in_order(tmp_path: Path) -> None:
    output = io.StringIO()
    group = ProcessGroup(
        [child(tmp_path, "low", 0), child(tmp_path, "mid", 1), child(tmp_path, "top", 2)], Console(output)
    )
    group.start()
    group.wait_ready(DEADLINE_S)
    first = group.pids()
    assert set(first) == {"low", "mid", "top"}

    group.send("mid", signal.SIGKILL)
    wait_for(lambda: group.pids().get("mid", first["mid"]) != first["mid"] and group.ready, "mid is back")
    assert {name: pid for name, pid in group.pids().items() if name != "mid"} == {
        "low": first["low"],
        "top": first["top"],
    }

    group.stop()
    assert group.join(DEADLINE_S)
    assert (tmp_path / "stopped").read_text().split() == ["top", "mid", "low"]
    assert group.pids() == {}
    assert output.getvalue().count("mid        | hello from mid\n") == 2


def test_a_start_that_fails_ends_the_launch_with_the_childs_words(tmp_path: Path) -> None:
    group = ProcessGroup([child(tmp_path, "good"), child(tmp_path, "bad", program=FAILS)], Console(io.StringIO()))
    group.start()
    with pytest.raises(
        LaunchError, match=r"^bad did not start \(exit status 2\): no config.json in /models/x$"
    ) as caught:
        group.wait_ready(DEADLINE_S)
    assert caught.value.exit_status == 2
    assert group.join(DEADLINE_S)


def test_a_crash_at_start_shows_the_end_of_its_output(tmp_path: Path) -> None:
    program = "import os; print('out of luck', flush=True); os.kill(os.getpid(), 9)"
    group = ProcessGroup([child(tmp_path, "bad", program=program)], Console(io.StringIO()))
    group.start()
    with pytest.raises(LaunchError, match=r"bad did not start \(signal SIGKILL\): out of luck") as caught:
        group.wait_ready(DEADLINE_S)
    assert caught.value.exit_status == 1
    assert group.join(DEADLINE_S)


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    spec = ProcessSpec(Member("ghost"), ("/nonexistent/program",), ready=lambda pid: False)
    group = ProcessGroup([spec], Console(io.StringIO()))
    group.start()
    with pytest.raises(LaunchError, match="cannot run /nonexistent/program"):
        group.wait_ready(DEADLINE_S)
    assert group.join(DEADLINE_S)


def test_one_that_does_not_drain_in_time_is_killed_with_its_own_children(tmp_path: Path) -> None:
    program = """
import pathlib, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
folder = pathlib.Path(sys.argv[2])
(folder / "grandchild").write_text(str(grandchild.pid))
(folder / sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""
    group = ProcessGroup([child(tmp_path, "stubborn", program=program, drain_s=0.3)], Console(io.StringIO()))
    group.start()
    group.wait_ready(DEADLINE_S)
    group.stop()
    assert group.join(DEADLINE_S)
    grandchild = int((tmp_path / "grandchild").read_text())
    wait_for(lambda: not _alive(grandchild), "the grandchild is gone")


@pytest.mark.parametrize("drain_s", [float("inf"), 1e10])
def test_a_drain_that_has_all_the_time_in_the_world(tmp_path: Path, drain_s: float) -> None:
    group = ProcessGroup(
        [child(tmp_path, "low", 0), child(tmp_path, "top", 1, drain_s=drain_s)], Console(io.StringIO())
    )
    group.start()
    group.wait_ready(DEADLINE_S)
    group.stop()
    assert group.join(DEADLINE_S) and group.error is None
    assert (tmp_path / "stopped").read_text().split() == ["top", "low"]


def test_an_error_of_its_own_is_told_and_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(pid: int) -> bool:
        raise KeyError("workers")

    good = child(tmp_path, "good")
    group = ProcessGroup([good, replace(good, member=Member("bad"), ready=broken)], Console(io.StringIO()))
    group.start()
    with pytest.raises(LaunchError, match=r"^the supervisor failed: KeyError: 'workers'$") as caught:
        group.wait_ready(DEADLINE_S)
    assert caught.value.exit_status == 1
    assert group.join(DEADLINE_S) and not group.ready
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "KeyError" in caplog.text


def test_stop_before_ready(tmp_path: Path) -> None:
    spec = ProcessSpec(Member("slow"), (sys.executable, "-c", "import time; time.sleep(600)"), ready=lambda pid: False)
    group = ProcessGroup([spec], Console(io.StringIO()))
    group.start()
    with pytest.raises(TimeoutError, match="slow"):
        group.wait_ready(0.05)
    group.stop()
    with pytest.raises(LaunchError, match="stopped before everything was ready") as caught:
        group.wait_ready(DEADLINE_S)
    assert caught.value.exit_status == 0
    assert group.join(DEADLINE_S)


def test_what_a_child_is_told_on_standard_input_is_in_no_command_line(tmp_path: Path) -> None:
    program = "import sys; secret = sys.stdin.read(); print('got', len(secret), 'characters'); sys.exit(3)"
    spec = ProcessSpec(Member("child"), (sys.executable, "-c", program), lambda pid: False, stdin="x" * 5000)
    assert "xxx" not in repr(spec)
    group = ProcessGroup([spec], Console(io.StringIO()))
    group.start()
    with pytest.raises(LaunchError, match="got 5000 characters"):
        group.wait_ready(DEADLINE_S)
    assert group.join(DEADLINE_S)


PARENT = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from penstock.child_process import ProcessSpec
from penstock.console import Console
from penstock.launcher import run_in_foreground
from penstock.process_group import ProcessGroup
from penstock.supervisor import Member

folder = pathlib.Path(sys.argv[1])
CHILD = (folder / "child.py").read_text()
def spec(name, tier):
    return ProcessSpec(
        Member(name, tier=tier, drain_s=float(sys.argv[3])),
        (sys.executable, "-c", CHILD, name, str(folder)),
        lambda pid: (folder / name).exists() and (folder / name).read_text() == str(pid),
    )
group = ProcessGroup([spec("low", 0), spec("top", 1)], Console())
def ready():
    return "ready " + " ".join(str(pid) for pid in group.pids().values())
sys.exit(run_in_foreground(group, ready, float(sys.argv[3])))
"""

FAILS_LATER = """
from penstock.supervisor import Supervisor
def broken(*_):
    raise RuntimeError("a bug")
Supervisor.process_exited = broken
"""


class Launched:
    """A launcher in a process of its own, with two children."""

    def __init__(self, folder: Path, program: str = CHILD, drain_s: float = 10.0, prelude: str = "") -> None:
        (folder / "child.py").write_text(program)
        checkout = str(Path(__file__).parents[2])
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude + PARENT, str(folder), checkout, str(drain_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        word, *pids = self.process.stdout.readline().split()
        assert word == "ready"
        self.pids = [int(pid) for pid in pids]

    def finish(self) -> tuple[int, str]:
        """(exit status, stderr) once it and its children are gone."""
        _, errors = self.process.communicate(timeout=DEADLINE_S)
        wait_for(lambda: not any(_alive(pid) for pid in self.pids), "all children are gone")
        return self.process.returncode, errors


def test_sigterm_drains_in_order_and_exits_with_0(tmp_path: Path) -> None:
    launched = Launched(tmp_path)
    launched.process.send_signal(signal.SIGTERM)
    status, errors = launched.finish()
    assert status == 0
    assert (tmp_path / "stopped").read_text().split() == ["top", "low"]
    assert "top        | hello from top" in errors
    assert errors.count("requests have up to 10 s") == 1


def test_the_second_signal_kills(tmp_path: Path) -> None:
    launched = Launched(tmp_path, CHILD.replace("sys.exit(0)", "pass"), drain_s=600)
    launched.process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "stopped").exists, "the first signal has arrived")
    launched.process.send_signal(signal.SIGINT)
    assert launched.finish()[0] == 130


def test_a_launcher_that_fails_later_says_so(tmp_path: Path) -> None:
    launched = Launched(tmp_path, prelude=FAILS_LATER)
    os.kill(launched.pids[0], signal.SIGKILL)
    status, errors = launched.finish()
    assert status == 1
    assert "the supervisor failed: everything is killed" in errors and "RuntimeError: a bug" in errors
    assert not (tmp_path / "stopped").exists()


def test_nothing_survives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launched = Launched(tmp_path)
    assert all(_alive(pid) for pid in launched.pids)
    launched.process.kill()
    assert launched.finish()[0] == -signal.SIGKILL
    assert not (tmp_path / "stopped").exists()


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
