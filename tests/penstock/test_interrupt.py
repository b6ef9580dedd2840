"""Ctrl-C while the command line is still being read: no traceback, whatever is being imported."""

from __future__ import annotations

import fcntl
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from penstock.interrupt import INTERRUPTED, leave_at_once, raise_interrupts

TRIES = 12
PIPE_BYTES = 4096  # how far the process gets ahead of who reads what it has imported
AHEAD = PIPE_BYTES // 42  # modules, at most: what is told of one is longer

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def command() -> Iterator[list[str]]:
    """`penstock serve`, of which every module that is imported shows; it ends where it would start processes."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        yield [sys.executable, "-X", "importtime", "-m", "penstock", "serve", "MODEL", "--port", str(port)]


def test_an_interrupt_at_any_instant_leaves_without_a_traceback(command: list[str]) -> None:
    lines = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, check=False).stderr.splitlines()
    assert "in use" in lines[-1]
    first = next(number for number, line in enumerate(lines) if line.endswith("| penstock.interrupt"))
    assert len(lines) - AHEAD > first + 2 + TRIES, "too few modules to tell"
    for number in random.sample(range(first + 2, len(lines) - AHEAD), TRIES):
        assert _interrupted(command, number) == (INTERRUPTED, []), f"after {number} modules"


def _interrupted(command: list[str], number: int) -> tuple[int, list[str]]:
    """Exit status, and what it says besides its imports, after an interrupt once it has told of so many."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        for _ in range(number):
            process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().decode().splitlines()
    return process.returncode, [line for line in rest if "import time:" not in line]


def test_only_the_usual_handler_is_replaced_and_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        leave_at_once()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        raise_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
        leave_at_once()
        raise_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
