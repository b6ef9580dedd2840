"""NIXL (UCX underneath): CMA on one host, TCP or RDMA between hosts, GPU memory where UCX has it.

One agent a process; the whole pool is registered once, and one descriptor a page is prepared for each side, so that a
copy names page indices only. Only the mover's thread calls in: `transfer` copies synchronously where UCX can (CMA).
There is no NIXL progress thread: it spins on a full core and halves the bandwidth (NIXL 1.5.1, two cores); instead the
mover calls `progress` now and then, which peers need to connect to us and, over TCP, to read.

A transfer in flight is never released: NIXL may still write after that. It is polled until it settles. For the same
reason a process must not exit normally with one in flight (segmentation fault): see `PageMover.close`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import Copy, CopyState, Transport, TransportError, check_pages


class NixlPool(msgspec.Struct, frozen=True):
    """What a peer needs to read our pool."""

    agent: str
    metadata: bytes  # NIXL's own: how to reach the agent, keys of the registered memory
    address: int
    page_bytes: int
    num_pages: int
    memory: str  # "DRAM" | "VRAM"
    device: int


class NixlCopy(Copy):
    """A posted transfer and its handle, which is dropped when it has settled."""

    def __init__(self, peer: str, size_bytes: int, handle: Any) -> None:
        super().__init__(peer, size_bytes)
        self.handle = handle
        self.state = CopyState.PENDING


class _Peer:
    """A connected peer: its agent and the prepared list of its pages."""

    def __init__(self, description: bytes, agent: str, pages: Any, num_pages: int) -> None:
        self.description = description
        self.agent = agent
        self.pages = pages
        self.num_pages = num_pages
        self.pending = 0  # copies
        self.lost = False  # the connection, which NIXL does not open again


class NixlTransport(Transport):
    """Reads (and, for measuring, writes) with NIXL. `agent` must be unique in the fleet: the worker's incarnation."""

    name = "nixl"
    unknown_link = True
    progress_s = 0.0005  # TCP reads of a peer: 1.45 GB/s at 0.5 ms, 1.0 at 1 to 2 ms, 0.55 at 5 ms

    def __init__(self, region: MemoryRegion, agent: str) -> None:
        """Raises TransportError when NIXL or its UCX plug-in is missing or refuses the memory."""
        self._nixl, bindings = import_nixl()
        self._errors = _error_types(bindings)
        self._disconnected: type[Exception] = bindings.nixlRemoteDisconnectError
        self._region = region
        self._name = agent
        self._memory = "DRAM" if region.device == "cpu" else "VRAM"
        self._device = int(region.device.partition(":")[2] or 0)
        self._peers: dict[str, _Peer] = {}
        try:
            config = self._nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            self._agent = self._nixl.nixl_agent(agent, config)
            if "UCX" not in self._agent.backends:
                raise TransportError("NIXL has no UCX plug-in here")
            whole = [(region.address, region.size_bytes, self._device, "")]
            self._registration = self._agent.register_memory(whole, self._memory, backends=["UCX"])
            self._pages = self._prepare("NIXL_INIT_AGENT", region.address, region.num_pages, self._memory, self._device)
        except self._errors as error:
            raise TransportError(f"NIXL cannot be used here: {_name(error)}") from error

    def description(self) -> bytes:
        region = self._region
        pool = NixlPool(
            agent=self._name,
            metadata=self._agent.get_agent_metadata(),
            address=region.address,
            page_bytes=region.page_bytes,
            num_pages=region.num_pages,
            memory=self._memory,
            device=self._device,
        )
        return msgspec.msgpack.encode(pool)

    def connect(self, peer: str, description: bytes) -> None:
        try:
            pool = msgspec.msgpack.decode(description, type=NixlPool)
        except msgspec.MsgspecError as error:
            raise TransportError(f"{peer} does not describe a NIXL pool: {error}") from error
        if pool.page_bytes != self._region.page_bytes:
            raise TransportError(f"{peer} has pages of {pool.page_bytes} bytes, ours {self._region.page_bytes}")
        self.disconnect(peer)
        added = False
        try:
            self._agent.add_remote_agent(pool.metadata)
            added = True
            pages = self._prepare(pool.agent, pool.address, pool.num_pages, pool.memory, pool.device)
        except self._errors as error:
            if added:
                with suppress(*self._errors):
                    self._agent.remove_remote_agent(pool.agent)
            raise TransportError(f"NIXL cannot reach {peer}: {_name(error)}") from error
        self._peers[peer] = _Peer(description, pool.agent, pages, pool.num_pages)

    def disconnect(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        # NIXL drops a dead peer by itself, and what is left of it must go all the same: it would come back as stale.
        with suppress(*self._errors):
            self._agent.release_dlist_handle(known.pages)
        with suppress(*self._errors):
            self._agent.remove_remote_agent(known.agent)

    def post(self, peer: str, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Copy:
        known = self._connected(peer)
        check_pages(src_pages, known.num_pages, dst_pages, self._region.num_pages)
        return self._transfer("READ", peer, known, local=dst_pages, remote=src_pages)

    def push(self, peer: str, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Copy:
        """As `post` in the other direction: our src_pages[i] onto the peer's page dst_pages[i].

        For measuring which direction a link likes. Workers only read: that a write has settled, its target cannot see.
        """
        known = self._connected(peer)
        check_pages(dst_pages, known.num_pages, src_pages, self._region.num_pages)
        return self._transfer("WRITE", peer, known, local=src_pages, remote=dst_pages)

    def _connected(self, peer: str) -> _Peer:
        """The peer; over a new connection, if the last one was lost (a firewall or a switch may have ended it)."""
        known = self._peers.get(peer)
        if known is None:
            raise TransportError(f"{peer} is not connected")
        if not known.lost:
            return known
        if known.pending:
            raise TransportError(f"the connection to {peer} was lost, and its copies have not settled yet")
        try:
            self.connect(peer, known.description)
        except TransportError:
            self._peers[peer] = known  # lost, and to be tried again
            raise
        return self._peers[peer]

    def _transfer(
        self, operation: str, peer: str, known: _Peer, *, local: Sequence[int], remote: Sequence[int]
    ) -> NixlCopy:
        ours, theirs = np.asarray(local, np.int32), np.asarray(remote, np.int32)
        try:
            handle = self._agent.make_prepped_xfer(operation, self._pages, ours, known.pages, theirs, backends=["UCX"])
        except self._errors as error:
            raise TransportError(f"NIXL refuses a copy from or to {peer}: {_name(error)}") from error
        copy = NixlCopy(peer, len(local) * self._region.page_bytes, handle)
        known.pending += 1
        self._observe(copy, self._agent.transfer)
        return copy

    def poll(self, copy: Copy) -> CopyState:
        assert isinstance(copy, NixlCopy)
        if copy.state is CopyState.PENDING:
            self._observe(copy, self._agent.check_xfer_state)
        return copy.state

    def progress(self) -> None:
        self._agent.get_new_notifs(["UCX"])  # nobody sends any: asking is what makes UCX work

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        self._agent.release_dlist_handle(self._pages)
        self._agent.deregister_memory(self._registration, backends=["UCX"])
        del self._pages, self._registration, self._agent  # the last references: this stops UCX

    def _observe(self, copy: NixlCopy, ask: Any) -> None:
        """Take over what NIXL says of a transfer. A lost connection settles it: UCX has closed the endpoint and nothing
        can arrive any more. Any other error does not prove that, so the copy stays pending, and its pages withheld."""
        try:
            said = ask(copy.handle)
        except self._disconnected:
            if copy.peer in self._peers:
                self._peers[copy.peer].lost = True
            copy.reason = f"the connection to {copy.peer} was lost"
            self._settle(copy, CopyState.FAILED)
        except self._errors as error:
            copy.reason = f"NIXL lost track of a copy from {copy.peer}: {_name(error)}"
        else:
            if said == "DONE":
                self._settle(copy, CopyState.DONE)
            elif said != "PROC":
                copy.reason = f"NIXL reports {said} for a copy from {copy.peer}"

    def _settle(self, copy: NixlCopy, state: CopyState) -> None:
        copy.state = state
        if copy.peer in self._peers:
            self._peers[copy.peer].pending -= 1
        handle, copy.handle = copy.handle, None
        with suppress(*self._errors):  # a lost connection's: the agent keeps it on a list of its own
            self._agent.release_xfer_handle(handle)

    def _prepare(self, agent: str, address: int, num_pages: int, memory: str, device: int) -> Any:
        """Prepared descriptor list, one a page: rows (address, length, device)."""
        rows = np.empty((num_pages, 3), np.uint64)
        rows[:, 0] = address + np.arange(num_pages, dtype=np.uint64) * np.uint64(self._region.page_bytes)
        rows[:, 1] = self._region.page_bytes
        rows[:, 2] = device
        return self._agent.prep_xfer_dlist(agent, rows, memory, backends=["UCX"])


def import_nixl() -> tuple[Any, Any]:
    """NIXL's Python module and its bindings, which hold the exceptions; imported when first needed (0.3 s)."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # read at import; INFO writes two lines an agent
    missing = []
    for package in ("nixl_cu13", "nixl"):
        try:
            return importlib.import_module(package), importlib.import_module(f"{package}._bindings")
        except ImportError as error:
            missing.append(f"{package}: {error}")
    raise TransportError(f"NIXL is not installed ({'; '.join(missing)})")


def _error_types(bindings: Any) -> tuple[type[Exception], ...]:
    """NIXL's exceptions have no common base of their own."""
    found = [value for value in vars(bindings).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*found, RuntimeError, ValueError)


def _name(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
