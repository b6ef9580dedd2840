"""How fast KV pages move between two workers' pools on one host, and what checksums cost.

    python benchmarks/transfer_cpu.py [--max-mib 512] [--repeats 5]

A lender process seals and lends, this process reads scattered pages through `PageMover`, as a decode worker does.
Links: shm, nixl (CMA), nixl over TCP loopback, and tcp. Writes benchmarks/results/transfer_cpu-<commit>.json: the best
and the median time of each row, GB/s of the best, and the machine's load before and after (other work shows in the
median).
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.mover import Completion, PageMover, ReadDone, ReadJob, Sealed, SealJob
from penstock.kv_transfer.select import OPENERS

RESULTS = Path(__file__).parent / "results"
LINKS = {"shm": ("shm", ""), "nixl": ("nixl", ""), "nixl-tcp": ("nixl", "tcp"), "tcp": ("tcp", "")}
PAGE_BYTES = (64 << 10, 256 << 10, 2 << 20)
TOTALS_MIB = (8, 64, 512)


class Worker:
    """A pool with a mover over one transport."""

    def __init__(self, transport: str, page_bytes: int, num_pages: int) -> None:
        fd = os.memfd_create("penstock-benchmark")
        os.ftruncate(fd, page_bytes * num_pages)
        self._map = mmap.mmap(fd, page_bytes * num_pages)
        self.pages = np.frombuffer(self._map, np.uint8).reshape(num_pages, page_bytes)
        self.pages[:] = 1  # memory that exists
        region = MemoryRegion(self.pages.ctypes.data, page_bytes, num_pages, "cpu", fd)
        opened = OPENERS[transport](region, f"bench-{os.getpid()}")
        self.description = opened.description()
        self._ready = threading.Event()
        self.mover = PageMover(region, [opened], self._ready.set, stall_s=60.0)

    def next_completion(self) -> Completion:
        """Block until the mover reports something."""
        while True:
            self._ready.wait()
            self._ready.clear()
            for completion in self.mover.poll_done():
                return completion


def lend(transport: str, page_bytes: int, num_pages: int) -> None:
    """The lender process: describes itself, then answers each line (page ids) with checksums and the time they took."""
    worker = Worker(transport, page_bytes, num_pages)
    worker.pages[:] = np.random.default_rng(0).integers(0, 256, worker.pages.shape, dtype=np.uint8)
    print(json.dumps(worker.description.hex()), flush=True)
    for line in sys.stdin:
        started = time.monotonic()
        worker.mover.seal(SealJob("seal", json.loads(line)))
        sealed = worker.next_completion()
        assert isinstance(sealed, Sealed)
        print(json.dumps({"ms": (time.monotonic() - started) * 1e3, "checksums": sealed.checksums}), flush=True)
    worker.mover.close()


def measure(link: str, page_bytes: int, max_mib: int, repeats: int) -> list[dict[str, object]]:
    """All totals for one link and page size, each with checksums off and on."""
    transport, tls = LINKS[link]
    os.environ["UCX_TLS"] = tls or "all"
    num_pages = (max_mib << 20) // page_bytes
    command = [sys.executable, __file__, "--lend", transport, str(page_bytes), str(num_pages)]
    lender = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert lender.stdin is not None and lender.stdout is not None
    description = bytes.fromhex(json.loads(lender.stdout.readline()))
    reader = Worker(transport, page_bytes, num_pages)
    reader.mover.connect("lender", transport, description)
    rows: list[dict[str, object]] = []
    for total_mib in [total for total in TOTALS_MIB if total <= max_mib]:
        number = (total_mib << 20) // page_bytes
        order = random.Random(number)
        src, dst = (order.sample(range(num_pages), number) for _ in range(2))
        for checked in (False, True):
            seal_ms, read_ms = [], []
            for _ in range(repeats + 1):
                lender.stdin.write(json.dumps(src if checked else src[:1]) + "\n")
                lender.stdin.flush()
                sealed = json.loads(lender.stdout.readline())
                job = ReadJob("read", "lender", transport, src, dst, sealed["checksums"] if checked else [])
                started = time.monotonic()
                reader.mover.read(job)
                done = reader.next_completion()
                assert isinstance(done, ReadDone), done
                read_ms.append((time.monotonic() - started) * 1e3)
                seal_ms.append(sealed["ms"])
            best_ms = min(read_ms[1:])
            row = {"link": link, "page_bytes": page_bytes, "pages": number, "bytes": number * page_bytes}
            row |= {"checksums": checked, "gb_per_s": round(number * page_bytes / best_ms / 1e6, 2)}
            row |= {"read_ms": round(best_ms, 3), "read_median_ms": round(statistics.median(read_ms[1:]), 3)}
            row |= {"seal_ms": round(min(seal_ms[1:]), 3)} if checked else {}
            rows.append(row)
            print(row, flush=True)
    assert reader.mover.close()
    lender.stdin.close()
    lender.wait()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-mib", type=int, default=512, help="largest read, and size of each pool")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lend", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.lend:
        lend(flags.lend[0], int(flags.lend[1]), int(flags.lend[2]))
        return
    load = [os.getloadavg()[0]]
    sizes = [(link, page_bytes) for link in LINKS for page_bytes in PAGE_BYTES]
    rows = [row for link, page in sizes for row in measure(link, page, flags.max_mib, flags.repeats)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpu_lines if line.startswith("model name")), "")
    result = {
        "commit": commit,
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "load": [*load, os.getloadavg()[0]],
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("nixl-cu13", "xxhash")},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"transfer_cpu-{commit}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
