"""How fast one process reads, or writes, another's scattered pages: two real processes, one of them the lender.

`measure` is for `penstock doctor` and benchmarks/transfer.py. It starts a reader process, which starts a lender: a
transport that crashes or hangs takes neither the caller nor the next measurement with it. Once the link is warm, every
pass is timed on the host from the post of the copy to its completion; afterwards the bytes at both ends of every page
are compared. What fills and compares leaves the link idle, so that every pass warms it up again.

    python -m penstock.kv_transfer.link_rate '{"transport": "nixl", ...}'    # prints what `measure` returns
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import Copy, CopyState, Transport, TransportError
from penstock.kv_transfer.nixl import NixlTransport
from penstock.kv_transfer.region import page_array
from penstock.kv_transfer.select import OPENERS

_MODULE = "penstock.kv_transfer.link_rate"
_LENDER_POLL_S = 0.0002
_ARRIVAL_S = 20.0  # the most one pass may take
_FIRST_WARM_UP_S = 0.3  # the first copies of a process are slower, for about a tenth of a second
_WARM_UP_S = 0.03  # and so are, for less long, the first after a pause


@dataclass(frozen=True)
class LinkSpec:
    """One link to measure. `passes`: how many pages each measured pass moves, none more than `num_pages`."""

    transport: str  # a name of select.OPENERS
    reader_device: str  # "cpu" or "cuda:N"
    lender_device: str
    page_bytes: int
    num_pages: int
    passes: tuple[int, ...]
    repeats: int = 5
    push: bool = False  # the reader writes its pages into the lender's pool instead; NIXL only
    ucx_tls: str = ""  # UCX_TLS of both processes; "": as it is

    def __post_init__(self) -> None:
        if self.page_bytes % 8 or not self.passes or not 0 < min(self.passes) <= max(self.passes) <= self.num_pages:
            raise ValueError(f"cannot be measured: {self}")


@dataclass(frozen=True)
class PassTime:
    """One pass: the fastest and the median of its repeats."""

    pages: int
    best_s: float
    median_s: float


class NoAnswer(TransportError):
    """The link took longer than it was given."""


def measure(spec: LinkSpec, timeout_s: float) -> list[PassTime]:
    """Times of `spec.passes`, in their order.

    Raises:
        NoAnswer: it took longer than timeout_s.
        TransportError: the link does not work, or gave wrong bytes.
    """
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | (
        {"UCX_TLS": spec.ucx_tls} if spec.ucx_tls else {}
    )
    process = subprocess.Popen(
        [sys.executable, "-m", _MODULE, json.dumps(asdict(spec))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException as interruption:
        os.killpg(process.pid, signal.SIGKILL)  # the lender is in the reader's session
        process.communicate()
        if not isinstance(interruption, subprocess.TimeoutExpired):
            raise
        raise NoAnswer(f"no answer within {timeout_s:.0f} s") from None
    lines = out.splitlines()
    if not lines:
        last = (err.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise TransportError(f"the measuring process died: {last}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise TransportError(answer["error"])
    return [PassTime(**one) for one in answer["passes"]]


class Pages(ABC):
    """Memory for pages, page i full of the number `first` + i."""

    region: MemoryRegion

    @abstractmethod
    def fill(self) -> None:
        """Every page as it was in the beginning."""

    @abstractmethod
    def ends(self) -> NDArray[np.int64]:
        """First and last word of every page, `[num_pages, 2]`."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""


class CpuPages(Pages):
    """A memfd, as the engine's pool on CPU is."""

    def __init__(self, page_bytes: int, num_pages: int, first: int) -> None:
        self._fd = os.memfd_create("penstock-link", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, page_bytes * num_pages)
        self._map = mmap.mmap(self._fd, page_bytes * num_pages)
        address = np.frombuffer(self._map, np.uint8).ctypes.data
        self.region = MemoryRegion(address, page_bytes, num_pages, "cpu", self._fd)
        self._first = first
        self.fill()

    def fill(self) -> None:
        self._words()[:] = np.arange(self._first, self._first + self.region.num_pages)[:, None]

    def _words(self) -> NDArray[np.int64]:
        return page_array(self.region).view(np.int64)

    def ends(self) -> NDArray[np.int64]:
        return self._words()[:, [0, -1]]

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)


class CudaPages(Pages):
    """A tensor of its own, as the engine's pool on a GPU is."""

    def __init__(self, device: str, page_bytes: int, num_pages: int, first: int) -> None:
        import torch

        self._torch = torch
        self.words = torch.empty(num_pages, page_bytes // 8, dtype=torch.int64, device=device)  # [page, word]
        self._numbers = torch.arange(first, first + num_pages, device=device)[:, None]
        self.region = MemoryRegion(self.words.data_ptr(), page_bytes, num_pages, device)
        self.fill()

    def fill(self) -> None:
        self.words[:] = self._numbers
        self._torch.cuda.synchronize(self.words.device)

    def ends(self) -> NDArray[np.int64]:
        self._torch.cuda.synchronize(self.words.device)
        found: NDArray[np.int64] = self.words[:, [0, -1]].cpu().numpy()
        return found

    def close(self) -> None:
        del self.words


def make_pages(device: str, page_bytes: int, num_pages: int, first: int) -> Pages:
    """`num_pages` pages on a device; page_bytes is a multiple of 8."""
    if device == "cpu":
        return CpuPages(page_bytes, num_pages, first)
    return CudaPages(device, page_bytes, num_pages, first)


def scattered(number: int, num_pages: int, seed: int) -> list[int]:
    """`number` different pages in no order, as a pool that has been used for a while gives them out."""
    return random.Random(seed).sample(range(num_pages), number)


class LenderProcess:
    """The reader's handle of the lender process."""

    def __init__(self, spec: LinkSpec) -> None:
        command = [sys.executable, "-m", _MODULE, json.dumps(asdict(spec)), "lend"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _ask(self, question: str = "") -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        if question:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise TransportError("the lender process died")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TransportError(f"the lender: {answer['error']}")
        return answer

    def description(self) -> bytes:
        """How to read its pages; waits until it has opened them."""
        return bytes.fromhex(self._ask()["description"])

    def fill(self) -> None:
        """As `Pages.fill`, of the lender's memory."""
        self._ask("fill")

    def ends(self) -> NDArray[np.int64]:
        """As `Pages.ends`, of the lender's memory."""
        return np.array(self._ask("ends")["ends"], np.int64)

    def kill(self) -> None:
        """End it at once, wherever it is."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let it leave; it may have been killed."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


def _lend(spec: LinkSpec, answer: Callable[[dict[str, Any]], None]) -> None:
    """The lender process: describes its pages, then serves them until standard input ends."""
    try:
        pages = make_pages(spec.lender_device, spec.page_bytes, spec.num_pages, first=0)
        transport = OPENERS[spec.transport](pages.region, f"lender-{os.getpid()}")
        answer({"description": transport.description().hex()})
    except (TransportError, RuntimeError) as error:
        answer({"error": str(error)})
        return
    while True:
        transport.progress()
        if select.select([sys.stdin], [], [], _LENDER_POLL_S)[0]:
            question = sys.stdin.readline().strip()
            if not question:
                break
            if question == "fill":
                pages.fill()
            answer({"ends": pages.ends().tolist()})
    transport.close()
    pages.close()


def _read(spec: LinkSpec) -> list[PassTime]:
    """The reader process."""
    lender = LenderProcess(spec)
    try:
        description = lender.description()
        pages = make_pages(spec.reader_device, spec.page_bytes, spec.num_pages, first=spec.num_pages)
        transport = OPENERS[spec.transport](pages.region, f"reader-{os.getpid()}")
        transport.connect("lender", description)
        every = list(range(max(spec.passes)))
        _warm_up(_FIRST_WARM_UP_S, transport, spec.push, every, every)
        times = [_measure_pass(spec, number, transport, pages, lender) for number in spec.passes]
        transport.close()
        pages.close()
        return times
    finally:
        lender.close()


def _measure_pass(spec: LinkSpec, number: int, transport: Transport, pages: Pages, lender: LenderProcess) -> PassTime:
    theirs = scattered(number, spec.num_pages, seed=2 * number)
    ours = scattered(number, spec.num_pages, seed=2 * number + 1)
    pages.fill()
    lender.fill()
    _warm_up(_WARM_UP_S, transport, spec.push, theirs, ours)
    seconds = sorted(_pass(transport, spec.push, theirs, ours) for _ in range(spec.repeats))
    arrived = lender.ends()[theirs] if spec.push else pages.ends()[ours]
    sent = np.array(ours) + spec.num_pages if spec.push else np.array(theirs)
    if not np.array_equal(arrived, np.stack([sent, sent], axis=1)):
        raise TransportError("what arrived is not what was sent")
    return PassTime(number, seconds[0], statistics.median(seconds))


def _warm_up(seconds: float, transport: Transport, push: bool, theirs: Sequence[int], ours: Sequence[int]) -> None:
    """Passes for as long as that, and one at least."""
    warm_at = time.monotonic() + seconds
    while True:
        _pass(transport, push, theirs, ours)
        if time.monotonic() >= warm_at:
            return


def _pass(transport: Transport, push: bool, theirs: Sequence[int], ours: Sequence[int]) -> float:
    started = time.perf_counter()
    copy = _post(transport, push, theirs, ours)
    while (state := transport.poll(copy)) is CopyState.PENDING:
        if time.perf_counter() - started > _ARRIVAL_S:
            raise TransportError(f"a copy did not end within {_ARRIVAL_S:.0f} s")
    if state is CopyState.FAILED:
        raise TransportError(copy.reason or "a copy failed")
    return time.perf_counter() - started


def _post(transport: Transport, push: bool, theirs: Sequence[int], ours: Sequence[int]) -> Copy:
    if not push:
        return transport.post("lender", theirs, ours)
    if not isinstance(transport, NixlTransport):
        raise TransportError(f"{transport.name} only reads")
    return transport.push("lender", ours, theirs)


def main(arguments: Sequence[str]) -> None:
    """`SPEC`: the reader's part; `SPEC lend`: the lender's."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(answered: dict[str, Any]) -> None:
        print(json.dumps(answered), file=answers, flush=True)

    given = json.loads(arguments[0])
    spec = LinkSpec(**given | {"passes": tuple(given["passes"])})
    if arguments[1:] == ["lend"]:
        _lend(spec, answer)
        return
    try:
        answer({"passes": [asdict(one) for one in _read(spec)]})
    except (TransportError, RuntimeError) as error:
        answer({"error": str(error)})
    os._exit(0)  # a copy may still be in flight, with which NIXL does not survive a normal exit


if __name__ == "__main__":
    main(sys.argv[1:])
