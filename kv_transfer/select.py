"""Which transports a worker offers, and which one it reads a peer with. Called at start-up and at a peer's Hello."""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import CopyState, Transport, TransportError
from penstock.kv_transfer.cuda_ipc import CudaIpcTransport, is_same_host
from penstock.kv_transfer.nixl import NixlTransport
from penstock.kv_transfer.region import page_array
from penstock.kv_transfer.shm import ShmTransport, is_local
from penstock.kv_transfer.tcp import ON_LOOPBACK, Listen, TcpTransport

logger = logging.getLogger("penstock.kv_transfer")

# Fastest first: on one host both read faster than NIXL does (docs/performance.md).
_ANY_HOST = ("nixl", "tcp")
_SAME_HOST = ("cuda_ipc", "shm", *_ANY_HOST)

OPENERS: dict[str, Callable[[MemoryRegion, str], Transport]] = {
    "cuda_ipc": lambda region, _: CudaIpcTransport(region),
    "shm": lambda region, _: ShmTransport(region),
    "nixl": NixlTransport,
    "tcp": lambda region, _: TcpTransport(region),
}
"""How a transport is opened over a pool; the text is its name in the fleet (a worker's incarnation)."""

_PROBE_TIMEOUT_S = 10.0


def open_transports(
    setting: str, region: MemoryRegion, incarnation: str, listen: Listen = ON_LOOPBACK
) -> list[Transport]:
    """Open what `setting` ("auto", or a transport's name) names and works here, best for one host first; logs a line
    each. "auto" is CUDA IPC for a pool on a GPU and shared memory for one on CPU, NIXL where there is RDMA, and TCP.

    To be tried, a transport has to read page 0 of our pool into a page of its own, as a peer would.

    Raises:
        TransportError: a transport asked for by name, or TCP at a port of its own, does not work, or none does.
    """
    own = "shm" if region.device == "cpu" else "cuda_ipc"
    wanted = [own, *(["nixl"] if rdma_devices() else []), "tcp"] if setting == "auto" else [setting]
    opened: list[Transport] = []
    for name in wanted:
        try:
            started = time.monotonic()
            transport = TcpTransport(region, listen) if name == "tcp" else OPENERS[name](region, incarnation)
            try:
                if isinstance(transport, CudaIpcTransport):
                    transport.self_test()
                else:
                    _probe(transport, OPENERS[name], region, f"{incarnation}-probe")
            except TransportError:
                transport.close()
                raise
        except TransportError as error:
            logger.info("transport %s: not used: %s", name, error)
            if setting != "auto" or (name == "tcp" and listen.port):
                close_transports(opened)
                raise
        else:
            logger.info("transport %s: works, opened in %.2f s", name, time.monotonic() - started)
            opened.append(transport)
    if not opened:
        raise TransportError("no transport works here")
    return opened


def close_transports(transports: Sequence[Transport]) -> None:
    """Give back what no mover has taken over."""
    for transport in transports:
        transport.close()


def rdma_devices(root: Path = Path("/")) -> list[str]:
    """Names of the RDMA devices that have a link and that we may use: a container sees the host's, whether or not they
    were given to it. Without any, NIXL would take TCP."""
    if not any(os.access(verbs, os.R_OK | os.W_OK) for verbs in root.glob("dev/infiniband/uverbs*")):
        return []
    found: dict[str, None] = {}
    for port in sorted(root.glob("sys/class/infiniband/*/ports/*/state")):
        with suppress(OSError):
            if "ACTIVE" in port.read_text():
                found[port.parts[-4]] = None
    return list(found)


def same_host(peer_transports: Mapping[str, bytes]) -> bool:
    """Whether the peer's memory may be mapped here: same boot of the same kernel and, on CPU, same process namespace.
    False for a peer that offers neither shared memory nor CUDA IPC."""
    if "cuda_ipc" in peer_transports:
        return is_same_host(peer_transports["cuda_ipc"])
    return "shm" in peer_transports and is_local(peer_transports["shm"])


def choose(own: Sequence[str], peer_transports: Mapping[str, bytes], same_host: bool) -> str:
    """Name of the transport to read this peer with.

    Raises:
        TransportError: there is none in common.
    """
    for name in _SAME_HOST if same_host else _ANY_HOST:
        if name in own and name in peer_transports:
            return name
    where = "on this host" if same_host else "on another host"
    raise TransportError(
        f"no transport in common with a peer {where}: we have {', '.join(own) or 'none'}, "
        f"it has {', '.join(peer_transports) or 'none'}"
    )


def _probe(
    transport: Transport, opener: Callable[[MemoryRegion, str], Transport], region: MemoryRegion, name: str
) -> None:
    """Read page 0 through a second transport over one scratch page; raises TransportError unless it arrives intact."""
    with mmap.mmap(-1, region.page_bytes) as memory:
        scratch = np.frombuffer(memory, np.uint8)
        page = MemoryRegion(scratch.ctypes.data, region.page_bytes, num_pages=1)
        expected = page_array(region)[0].copy() if region.device == "cpu" else None
        if expected is not None:
            scratch[:] = ~expected
        reader = opener(page, name)
        settled = True
        try:
            reader.connect(name, transport.description())
            copy = reader.post(name, [0], [0])
            state = CopyState.PENDING
            deadline = time.monotonic() + _PROBE_TIMEOUT_S
            while (state := reader.poll(copy)) is CopyState.PENDING and time.monotonic() < deadline:
                transport.progress()
            settled = state is not CopyState.PENDING
            if state is not CopyState.DONE:
                raise TransportError(f"reading a page of the own pool: {copy.reason or 'no answer'}")
            if expected is not None and not np.array_equal(scratch, expected):
                raise TransportError("reading a page of the own pool gave other bytes")
        finally:
            reader.sever(name)
            if settled or reader.poll(copy) is not CopyState.PENDING:
                reader.close()
            del scratch
