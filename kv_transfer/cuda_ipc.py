"""CUDA IPC for workers with GPUs on one host: the peer's pool is mapped here, and one kernel of ours pulls its pages.

The owner describes its pool by the handle of the allocation it lies in and its offset there. The reader maps it on its
own device (over NVLink or PCIe where the devices differ) and copies a whole list with one launch
(kernels/copy_pages.py) on a stream of its own, with an event behind it: posting takes microseconds, polling asks the
event.

A mapping is dropped only when its copies are settled (`PageMover` sees to that). Whether the owner may be reached is
proven by opening its handle: containers, peer access and the kind of memory all have a say.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import Copy, CopyState, Transport, TransportError, check_pages
from penstock.kv_transfer.cuda_driver import CudaDriver
from penstock.kv_transfer.shm import host_id

_SELF_TEST_S = 10.0


class IpcPool(msgspec.Struct, frozen=True):
    """Where another process on this host finds a pool."""

    boot: str  # of the kernel: equal on one host, in all its containers
    process: str  # equal in the owner itself only, where a handle cannot be opened
    device: str  # UUID
    handle: bytes
    offset: int  # of the pool in the allocation that the handle stands for
    address: int  # of the pool in the owner
    page_bytes: int
    num_pages: int


class Driver(Protocol):
    """What this needs of `CudaDriver`, for one device."""

    def allocation(self, address: int) -> tuple[int, int]: ...
    def export(self, base: int) -> bytes: ...
    def open(self, handle: bytes) -> int: ...
    def unmap(self, base: int) -> None: ...
    def read(self, address: int, size_bytes: int) -> bytes: ...
    def close(self) -> None: ...


class Lane(Protocol):
    """A stream on the reader's device."""

    device: str  # UUID

    def check_peer(self, device: str) -> None:
        """Raise TransportError if that device is visible here and ours cannot reach its memory."""

    def copy(self, src: int, dst: int, page_bytes: int, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Any:
        """Launch; what it returns has `query() -> bool` and keeps alive what the launch reads."""

    def scratch(self, page_bytes: int) -> Any:
        """A page of our own with every bit set; has `data_ptr()`."""


class IpcCopy(Copy):
    """A launched copy and the event behind it, dropped when it has settled."""

    def __init__(self, peer: str, size_bytes: int, launched: Any) -> None:
        super().__init__(peer, size_bytes)
        self.launched = launched
        self.state = CopyState.PENDING if launched is not None else CopyState.DONE


class _Mapping:
    """A peer's pool here. `base` is 0 for a pool of our own process, which is not mapped."""

    def __init__(self, base: int, address: int, num_pages: int) -> None:
        self.base = base
        self.address = address
        self.num_pages = num_pages


class CudaIpcTransport(Transport):
    """Reads with a kernel of ours over mapped memory."""

    name = "cuda_ipc"
    batch_bytes = 256 << 20  # a launch and two looks at it take 0.1 ms; nothing on this way is slow enough to stall

    def __init__(self, region: MemoryRegion, driver: Driver | None = None, lane: Lane | None = None) -> None:
        """Opens the device's stream; `driver` and `lane` are the real ones unless given.

        Raises:
            TransportError: the pool is not on a GPU, its pages are of an odd size, or it cannot be exported.
        """
        kind, _, index = region.device.partition(":")
        if kind != "cuda":
            raise TransportError(f"CUDA IPC needs a pool on a GPU, not {region.device}")
        if region.page_bytes % 16 or region.address % 16:
            raise TransportError(f"pages of {region.page_bytes} bytes cannot be copied 16 bytes at a time")
        self._region = region
        self._driver = driver or CudaDriver(int(index or 0))
        self._peers: dict[str, _Mapping] = {}
        try:
            self._lane = lane or _open_lane(int(index or 0))
            base, size_bytes = self._driver.allocation(region.address)
            if region.address + region.size_bytes > base + size_bytes:
                raise TransportError("the pool lies in several allocations (expandable segments must be off)")
            handle = self._driver.export(base)
        except TransportError:
            self._driver.close()
            raise
        self._described = msgspec.msgpack.encode(
            IpcPool(
                boot=_boot_id(),
                process=_process_id(),
                device=self._lane.device,
                handle=handle,
                offset=region.address - base,
                address=region.address,
                page_bytes=region.page_bytes,
                num_pages=region.num_pages,
            )
        )

    def description(self) -> bytes:
        return self._described

    def connect(self, peer: str, description: bytes) -> None:
        try:
            pool = msgspec.msgpack.decode(description, type=IpcPool)
        except msgspec.MsgspecError as error:
            raise TransportError(f"{peer} does not describe a pool on a GPU: {error}") from error
        if pool.boot != _boot_id():
            raise TransportError(f"{peer} runs on another host")
        if pool.page_bytes != self._region.page_bytes:
            raise TransportError(f"{peer} has pages of {pool.page_bytes} bytes, ours {self._region.page_bytes}")
        if pool.process == _process_id():
            mapping = _Mapping(0, pool.address, pool.num_pages)
        else:
            self._lane.check_peer(pool.device)
            base = self._driver.open(pool.handle)
            mapping = _Mapping(base, base + pool.offset, pool.num_pages)
        self.disconnect(peer)
        self._peers[peer] = mapping

    def disconnect(self, peer: str) -> None:
        mapping = self._peers.pop(peer, None)
        if mapping is not None and mapping.base:
            self._driver.unmap(mapping.base)

    def post(self, peer: str, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Copy:
        mapping = self._peers.get(peer)
        if mapping is None:
            raise TransportError(f"{peer} is not connected")
        region = self._region
        check_pages(src_pages, mapping.num_pages, dst_pages, region.num_pages)
        launched = None
        if dst_pages:
            try:
                launched = self._lane.copy(mapping.address, region.address, region.page_bytes, src_pages, dst_pages)
            except RuntimeError as error:  # the launch was refused
                raise TransportError(f"CUDA: {error}") from error
        return IpcCopy(peer, len(dst_pages) * region.page_bytes, launched)

    def poll(self, copy: Copy) -> CopyState:
        assert isinstance(copy, IpcCopy)
        if copy.state is CopyState.PENDING:
            try:
                done = copy.launched.query()
            except RuntimeError as error:  # the context is lost, and with it whatever ran in it
                copy.reason = f"CUDA: {error}"
                copy.state = CopyState.FAILED
            else:
                copy.state = CopyState.DONE if done else CopyState.PENDING
        if copy.state is not CopyState.PENDING:
            copy.launched = None
        return copy.state

    def progress(self) -> None:
        """Peers read without our help."""

    def self_test(self) -> None:
        """Read page 0 of our own pool into a page of its own, compare by the driver's copy. Compiles the kernel.

        Raises:
            TransportError: it does not arrive, or not intact.
        """
        region = self._region
        try:
            page = self._lane.scratch(region.page_bytes)
            launched = self._lane.copy(region.address, page.data_ptr(), region.page_bytes, [0], [0])
            deadline = time.monotonic() + _SELF_TEST_S
            while not launched.query():
                if time.monotonic() > deadline:
                    raise TransportError("reading a page of the own pool: no answer")
        except RuntimeError as error:  # of CUDA, or of Triton, which compiles here
            raise TransportError(f"reading a page of the own pool: {error}") from error
        arrived, sent = (self._driver.read(one, region.page_bytes) for one in (page.data_ptr(), region.address))
        if arrived != sent:
            raise TransportError("reading a page of the own pool gave other bytes")

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        self._driver.close()


def is_same_host(description: bytes) -> bool:
    """Whether the owner of this cuda_ipc description runs under this kernel."""
    try:
        return msgspec.msgpack.decode(description, type=IpcPool).boot == _boot_id()
    except msgspec.MsgspecError:
        return False


def _boot_id() -> str:
    return host_id().partition("/")[0]


def _process_id() -> str:
    return f"{host_id()}/{os.getpid()}"


def _open_lane(index: int) -> Lane:
    from penstock.kv_transfer.cuda_lane import CudaLane

    return CudaLane(index)
