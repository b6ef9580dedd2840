"""Shared memory for workers on one host: the peer's pool is mapped here, and pages are copied by the CPU.

A pool on CPU is a memfd. Its owner describes it by process id and descriptor; we open /proc/<pid>/fd/<fd> after making
sure that it is that very file (name and inode), so that a reused process id is noticed. The mapping keeps the memory
alive: a peer that dies, or is stopped, in the middle of a copy is not even noticed.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import msgspec
import numpy as np

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import Copy, CopyState, Transport, TransportError, check_pages, runs
from penstock.kv_transfer.region import PageArray, page_array


class SharedPool(msgspec.Struct, frozen=True):
    """Where another process finds a pool."""

    host: str  # `host_id()` of the owner
    pid: int
    fd: int
    file: str  # what the descriptor links to; the memfd's name carries the worker's incarnation
    inode: int
    page_bytes: int
    num_pages: int


def host_id() -> str:
    """Equal for processes that can see each other in /proc: same boot of the same kernel, same process namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"


def is_local(description: bytes) -> bool:
    """Whether the owner of this shm description runs on this host (and in this process namespace)."""
    try:
        return msgspec.msgpack.decode(description, type=SharedPool).host == host_id()
    except msgspec.MsgspecError:
        return False


class _Mapping:
    """A peer's pool, mapped read-only."""

    def __init__(self, pool: SharedPool) -> None:
        fd = _open(pool)
        try:
            self._map = mmap.mmap(fd, pool.page_bytes * pool.num_pages, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.pages: PageArray = np.frombuffer(self._map, np.uint8).reshape(pool.num_pages, pool.page_bytes)

    def close(self) -> None:
        del self.pages  # a map with live views cannot be closed
        self._map.close()


class ShmTransport(Transport):
    """Copies on `post`, in the calling thread; the interpreter lock is free while bytes move."""

    name = "shm"

    def __init__(self, region: MemoryRegion) -> None:
        if region.device != "cpu":
            raise TransportError(f"shared memory needs a pool on CPU, not {region.device}")
        self._region = region
        self._pages = page_array(region)
        self._peers: dict[str, _Mapping] = {}

    def description(self) -> bytes:
        region = self._region
        if region.fd < 0:
            raise TransportError("the pool has no file behind it that a peer could map")
        pool = SharedPool(
            host=host_id(),
            pid=os.getpid(),
            fd=region.fd,
            file=os.readlink(f"/proc/self/fd/{region.fd}"),
            inode=os.fstat(region.fd).st_ino,
            page_bytes=region.page_bytes,
            num_pages=region.num_pages,
        )
        return msgspec.msgpack.encode(pool)

    def connect(self, peer: str, description: bytes) -> None:
        try:
            pool = msgspec.msgpack.decode(description, type=SharedPool)
            if pool.host != host_id():
                raise TransportError(f"{peer} runs on another host or in another process namespace")
            if pool.page_bytes != self._region.page_bytes:
                raise TransportError(f"{peer} has pages of {pool.page_bytes} bytes, ours {self._region.page_bytes}")
            mapping = _Mapping(pool)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise TransportError(f"cannot map the pool of {peer}: {error}") from error
        self.disconnect(peer)
        self._peers[peer] = mapping

    def disconnect(self, peer: str) -> None:
        mapping = self._peers.pop(peer, None)
        if mapping is not None:
            mapping.close()

    def post(self, peer: str, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Copy:
        mapping = self._peers.get(peer)
        if mapping is None:
            raise TransportError(f"{peer} is not connected")
        check_pages(src_pages, len(mapping.pages), dst_pages, len(self._pages))
        for src, dst, count in runs(src_pages, dst_pages):
            self._pages[dst : dst + count] = mapping.pages[src : src + count]
        return Copy(peer, len(dst_pages) * self._region.page_bytes)

    def poll(self, copy: Copy) -> CopyState:
        return CopyState.DONE

    def progress(self) -> None:
        """Peers read without our help."""

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)


def _open(pool: SharedPool) -> int:
    """Descriptor of the pool's file. The link is read before opening, so that nothing else is ever opened, and the
    opened file is compared again, because the process id may change hands in between."""
    path = f"/proc/{pool.pid}/fd/{pool.fd}"
    if os.readlink(path) != pool.file:
        raise OSError(f"{path} is not {pool.file}")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    found = os.fstat(fd)
    if found.st_ino != pool.inode or found.st_size < pool.page_bytes * pool.num_pages:
        os.close(fd)
        raise OSError(f"{path} is not the pool that was described")
    return fd
