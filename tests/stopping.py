"""SIGSTOP that has taken effect: the kernel tells one thread, and only when that one runs are the others told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def stop_process(pid: int, timeout_s: float = 20.0) -> None:
    """Send SIGSTOP and return when no thread of the process can run any more."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + timeout_s
    while _thread_states(pid) != {"T"}:
        assert time.monotonic() < deadline, f"process {pid} did not stop"
        time.sleep(0.001)


def _thread_states(pid: int) -> set[str]:
    states = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            states.add(stat.read_text().rpartition(")")[2].split()[0])
        except FileNotFoundError:  # a thread that has just ended
            continue
    return states
