"""How fast one worker's pages get into another's, over every transport, beside what a plain copy does.

    python benchmarks/transfer.py                       # two GPUs, or one for both workers, or none: CPU
    python benchmarks/transfer.py --devices cuda:0,cuda:1 --tokens 2048,32768

Pages have the shape of an 8B model's: 128 KiB of KV a token. Two processes with a pool each; for every number of tokens
the reader moves as many scattered pages, and the time is from the post of the copy to its completion, on the reader's
host, the fastest of the repeats. The peer-copy rate is that of one large contiguous copy between the two devices.
Writes benchmarks/results/transfer-<commit>.json: {"peer_copy_gb_s", "rows": [{"transport", "page_tokens", "tokens",
"bytes", "ms", "gb_s"}]}, and "checksums", what sealing the same pages costs where they lie.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

import torch

from benchmarks.record import RESULTS, commit, file_name, machine, merge
from penstock.kernels.page_checksum import checksum_name, page_checksums
from penstock.kv_transfer.base import TransportError
from penstock.kv_transfer.link_rate import LinkSpec, measure, scattered

TOKEN_BYTES = 32 * 8 * 128 * 2 * 2  # layers, KV heads, head size, keys and values, bfloat16
PAGE_TOKENS = (16, 32, 64)
GPU_TOKENS = tuple(128 << i for i in range(9))  # to 32768: 4 GiB
CPU_TOKENS = (128, 512, 2048)
TIMEOUT_S = 240.0
PEER_COPY_BYTES = 1 << 30
# As recorded -> (transport, the reader writes instead, UCX_TLS).
TRANSPORTS = {
    "cuda_ipc": ("cuda_ipc", False, ""),
    "shm": ("shm", False, ""),
    "nixl-read": ("nixl", False, ""),
    "nixl-write": ("nixl", True, ""),
    "nixl-read-tcp": ("nixl", False, "tcp"),
    "nixl-write-tcp": ("nixl", True, "tcp"),
    "tcp": ("tcp", False, ""),
}
ON_GPU = ("cuda_ipc", "nixl-read", "nixl-write")  # tcp takes a minute a page size
ON_CPU = ("shm", "nixl-read", "nixl-write", "nixl-read-tcp", "nixl-write-tcp", "tcp")


def default_devices() -> tuple[str, str]:
    """(lender's, reader's)."""
    if not torch.cuda.is_available():
        return "cpu", "cpu"
    return "cuda:0", f"cuda:{min(1, torch.cuda.device_count() - 1)}"


def links(
    transports: Sequence[str], devices: tuple[str, str], page_tokens: Sequence[int], tokens: Sequence[int], repeats: int
) -> list[tuple[str, int, LinkSpec]]:
    """(transport, page_tokens, link) of every pair of processes to start. A quarter of each pool stays where it is."""
    planned = []
    for name in transports:
        transport, push, ucx_tls = TRANSPORTS[name]
        for size in page_tokens:
            passes = tuple(sorted({-(-number // size) for number in tokens}))
            spec = LinkSpec(
                transport,
                reader_device=devices[1],
                lender_device=devices[0],
                page_bytes=size * TOKEN_BYTES,
                num_pages=passes[-1] + max(1, passes[-1] // 4),
                passes=passes,
                repeats=repeats,
            )
            planned.append((name, size, replace(spec, push=push, ucx_tls=ucx_tls)))
    return planned


def row(transport: str, page_tokens: int, pages: int, seconds: float) -> dict[str, Any]:
    """One row of the record."""
    size_bytes = pages * page_tokens * TOKEN_BYTES
    return {
        "transport": transport,
        "page_tokens": page_tokens,
        "tokens": pages * page_tokens,
        "bytes": size_bytes,
        "ms": round(seconds * 1e3, 4),
        "gb_s": round(size_bytes / seconds / 1e9, 2),
    }


def peer_copy_gb_s(devices: tuple[str, str], size_bytes: int, repeats: int) -> float:
    """One contiguous copy from the lender's device to the reader's, the fastest of the repeats."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=devices[0])
    target = torch.ones(size_bytes, dtype=torch.uint8, device=devices[1])
    return size_bytes / fastest(lambda: target.copy_(source), devices, repeats) / 1e9


def checksum_rows(device: str, page_tokens: Sequence[int], tokens: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """What sealing as many pages costs where they lie, with the list's way there and the sums' way back."""
    found = []
    for size in page_tokens:
        passes = sorted({-(-number // size) for number in tokens})
        pages = torch.ones(passes[-1], size * TOKEN_BYTES, dtype=torch.uint8, device=device)
        for number in passes:
            listed = scattered(number, passes[-1], seed=number)
            seconds = fastest(lambda pages=pages, listed=listed: page_checksums(pages, listed), (device,), repeats)
            found.append(row(checksum_name(torch.device(device)), size, number, seconds))
        del pages
    return found


def fastest(work: Callable[[], object], devices: Sequence[str], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after one that warms up; until every device is done."""
    seconds = []
    for _ in range(repeats + 1):
        _synchronize(devices)
        started = time.perf_counter()
        work()
        _synchronize(devices)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and record; 1 if a transport failed (the record says why)."""
    options = _parser().parse_args(arguments)
    devices = tuple(options.devices.split(",")) if options.devices else default_devices()
    if len(devices) != 2:
        raise SystemExit("--devices: the lender's and the reader's, as in cuda:0,cuda:1")
    on_gpu = devices[0].startswith("cuda")
    page_tokens = _numbers(options.page_tokens) or PAGE_TOKENS
    tokens = _numbers(options.tokens) or (GPU_TOKENS if on_gpu else CPU_TOKENS)
    transports = tuple(filter(None, options.transports.split(","))) or (ON_GPU if on_gpu else ON_CPU)
    if unknown := set(transports) - TRANSPORTS.keys():
        raise SystemExit(f"--transports: unknown {', '.join(sorted(unknown))}; there are {', '.join(TRANSPORTS)}")
    copy_bytes = min(PEER_COPY_BYTES, max(tokens) * TOKEN_BYTES)
    rate = round(peer_copy_gb_s((devices[0], devices[1]), copy_bytes, options.repeats), 2)
    print(f"peer copy {devices[0]} to {devices[1]}: {rate} GB/s", flush=True)
    rows, errors = [], {}
    for name, size, spec in links(transports, (devices[0], devices[1]), page_tokens, tokens, options.repeats):
        try:
            rows += [row(name, size, one.pages, one.best_s) for one in measure(spec, TIMEOUT_S)]
        except TransportError as error:
            errors[f"{name}, pages of {size} tokens"] = str(error)
            print(f"{name}, pages of {size} tokens: {error}", flush=True)
        for found in [found for found in rows if (found["transport"], found["page_tokens"]) == (name, size)]:
            print(found, flush=True)
    checksums = checksum_rows(devices[1], page_tokens, tokens, options.repeats)
    out = Path(options.out) if options.out else RESULTS / file_name("transfer", commit())
    updates = {"devices": list(devices), "peer_copy_gb_s": rate, "rows": rows, "checksums": checksums}
    merge(out, machine(), commit(), updates | {"errors": [f"{what}: {why}" for what, why in errors.items()]})
    print(out)
    return int(bool(errors))


def _synchronize(devices: Sequence[str]) -> None:
    for device in {device for device in devices if device.startswith("cuda")}:
        torch.cuda.synchronize(device)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="", help="the lender's and the reader's: cuda:0,cuda:1")
    parser.add_argument("--transports", default="", help=f"some of {', '.join(TRANSPORTS)}")
    parser.add_argument("--tokens", default="", help="how much is moved: 2048,8192")
    parser.add_argument("--page-tokens", default="", help="page sizes: 16,64")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default="", help="the record's file")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
