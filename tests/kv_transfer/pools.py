"""Pools of known bytes, and lenders: real processes that own one and serve it."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import xxhash

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.mover import Completion, PageMover
from tests.forking import ForkedPython
from tests.stopping import stop_process


class Pool:
    """A memfd pool as the engine makes it, filled with random bytes from `seed` (or zeros)."""

    def __init__(self, page_bytes: int, num_pages: int, seed: int | None = None, name: str = "penstock-test") -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, page_bytes * num_pages)
        self._map = mmap.mmap(self.fd, page_bytes * num_pages)
        self.pages = np.frombuffer(self._map, np.uint8).reshape(num_pages, page_bytes)
        if seed is not None:
            self.pages[:] = contents(page_bytes, num_pages, seed)
        self.region = MemoryRegion(self.pages.ctypes.data, page_bytes, num_pages, "cpu", self.fd)

    def close(self) -> None:
        del self.pages
        self._map.close()
        os.close(self.fd)


def contents(page_bytes: int, num_pages: int, seed: int) -> np.ndarray:
    """What a pool of this seed holds, `[num_pages, page_bytes]`."""
    return np.random.default_rng(seed).integers(0, 256, (num_pages, page_bytes), dtype=np.uint8)


def sums(pages: np.ndarray) -> list[int]:
    """Checksums by xxhash's streaming interface, from copies of the bytes."""
    return [xxhash.xxh3_64(page.tobytes()).intdigest() for page in pages]


class Lender:
    """A process with a pool that serves it until told to leave."""

    def __init__(self, transport: str, page_bytes: int, num_pages: int, seed: int, ucx_tls: str = "") -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"UCX_TLS": ucx_tls} if ucx_tls else {})
        command = [sys.executable, "-m", "tests.kv_transfer.lender", transport]
        self.process = ForkedPython(
            [*command, str(page_bytes), str(num_pages), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the lender did not start"
        self.incarnation = f"lender-{self.process.pid}"
        self.description = bytes.fromhex(json.loads(line)["description"])

    def send(self, signal_number: signal.Signals) -> None:
        if signal_number == signal.SIGSTOP:
            stop_process(self.process.pid)
        else:
            self.process.send_signal(signal_number)
        if signal_number == signal.SIGKILL:
            self.process.wait()

    def flip_byte(self, page: int, offset: int) -> None:
        """Damage the lender's own page, after sealing."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{page} {offset}\n".encode())
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"flipped\n"

    def close(self) -> int:
        """End it, kindly if it still lives; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return self.process.wait(60)


def wait_for(
    mover: PageMover, wanted: Callable[[Sequence[Completion]], bool], limit_s: float = 60.0
) -> list[Completion]:
    """Completions until `wanted` is content with them; fails after limit_s."""
    heard: list[Completion] = []
    deadline = time.monotonic() + limit_s
    while not wanted(heard):
        assert time.monotonic() < deadline, heard
        heard += mover.poll_done()
        time.sleep(0.001)
    return heard


def count(number: int) -> Callable[[Sequence[Completion]], bool]:
    """Content with `number` completions."""
    return lambda heard: len(heard) >= number
