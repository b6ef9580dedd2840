"""CUDA IPC: its decisions with a made-up driver and stream, and the real ones between two processes on GPUs.

That driver hands out host memory under handles, as NVIDIA's hands out device memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import CopyState, TransportError
from penstock.kv_transfer.cuda_ipc import CudaIpcTransport, IpcPool, is_same_host
from penstock.kv_transfer.link_rate import CudaPages, LenderProcess, LinkSpec, PassTime, make_pages, measure
from penstock.kv_transfer.mover import PageMover, ReadDone, ReadFailed, ReadJob
from penstock.kv_transfer.select import OPENERS, choose, open_transports, same_host
from tests.kv_transfer.pools import count, wait_for

PAGE = 4096
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
on_gpu = pytest.mark.skipif(not GPUS, reason="needs a CUDA device")
PAIRS = [
    pytest.param("cuda:0", "cuda:0", id="one", marks=on_gpu),
    pytest.param("cuda:1", "cuda:0", id="two", marks=pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")),
]


class Memory:
    """Host memory that plays a device's: pages of random bytes behind `offset` bytes of somebody else's."""

    def __init__(self, num_pages: int, seed: int, offset: int = 64) -> None:
        self.whole = np.random.default_rng(seed).integers(0, 256, offset + num_pages * PAGE + 16, dtype=np.uint8)
        start = -self.whole.ctypes.data % 16 + offset
        self.pages = self.whole[start : start + num_pages * PAGE].reshape(num_pages, PAGE)
        self.region = MemoryRegion(self.pages.ctypes.data, PAGE, num_pages, "cuda:0")


class Driver:
    """Handles are addresses; counts what is mapped."""

    def __init__(self, memory: Memory, refuses: str = "") -> None:
        self.memory = memory
        self.refuses = refuses
        self.mapped: list[int] = []
        self.closed = False

    def allocation(self, address: int) -> tuple[int, int]:
        size = self.memory.whole.nbytes if self.refuses != "allocation" else 100
        return self.memory.whole.ctypes.data, size

    def export(self, base: int) -> bytes:
        if self.refuses == "export":
            raise TransportError("cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE")
        return base.to_bytes(64, "little")

    def open(self, handle: bytes) -> int:
        if self.refuses == "open":
            raise TransportError("cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_DEVICE")
        self.mapped.append(int.from_bytes(handle, "little"))
        return self.mapped[-1]

    def unmap(self, base: int) -> None:
        self.mapped.remove(base)

    def read(self, address: int, size_bytes: int) -> bytes:
        return ctypes.string_at(address, size_bytes)

    def close(self) -> None:
        self.closed = True


class Launched:
    """Copies when it is asked for the first time after `lane.run`, as a stream that is busy would."""

    def __init__(self, lane: Lane, moves: list[tuple[int, int, int]]) -> None:
        self.lane, self.moves = lane, moves

    def query(self) -> bool:
        if self.lane.broken:
            raise RuntimeError("an illegal memory access was encountered")
        if self.lane.run:
            for move in self.moves:
                ctypes.memmove(*move)
        return self.lane.run


class Lane:
    """A stream that runs when `run` is set."""

    device = "GPU-0"

    def __init__(self) -> None:
        self.run, self.broken, self.reachable, self.wrong = True, False, True, False

    def check_peer(self, device: str) -> None:
        if not self.reachable:
            raise TransportError("cuda:0 has no peer access to cuda:1")

    def copy(self, src: int, dst: int, page_bytes: int, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Launched:
        shift = int(self.wrong)
        pairs = zip(src_pages, dst_pages, strict=True)
        return Launched(self, [(dst + d * page_bytes, src + (s + shift) * page_bytes, page_bytes) for s, d in pairs])

    def scratch(self, page_bytes: int) -> Any:
        return torch.full((page_bytes,), 255, dtype=torch.uint8)


def pair(**change: object) -> tuple[Memory, Memory, CudaIpcTransport, Driver, Lane, bytes]:
    """Lender's and reader's memory, the reader's transport, and the lender's description as from another process."""
    lender, reader = Memory(8, seed=1), Memory(8, seed=2)
    described = CudaIpcTransport(lender.region, Driver(lender), Lane()).description()
    values: dict[str, object] = {"process": "another", **change}
    pool = msgspec.structs.replace(msgspec.msgpack.decode(described, type=IpcPool), **values)
    driver, lane = Driver(reader), Lane()
    return lender, reader, CudaIpcTransport(reader.region, driver, lane), driver, lane, msgspec.msgpack.encode(pool)


def test_a_list_is_read_from_where_the_pool_lies_in_the_mapping() -> None:
    lender, reader, transport, driver, lane, description = pair()
    expected = reader.pages.copy()
    expected[[7, 0, 3]] = lender.pages[[1, 6, 2]]
    transport.connect("p", description)
    lane.run = False
    copy = transport.post("p", [1, 6, 2], [7, 0, 3])
    assert copy.size_bytes == 3 * PAGE and transport.poll(copy) is CopyState.PENDING
    assert not np.array_equal(reader.pages, expected)
    lane.run = True
    assert transport.poll(copy) is CopyState.DONE
    assert np.array_equal(reader.pages, expected)
    lane.broken = True
    assert transport.poll(copy) is CopyState.DONE  # settled answers never change
    assert transport.poll(transport.post("p", [], [])) is CopyState.DONE
    assert len(driver.mapped) == 1
    transport.connect("p", description)  # replaces the mapping
    assert len(driver.mapped) == 1
    transport.close()
    assert driver.mapped == [] and driver.closed


def test_a_device_that_fails_settles_its_copies() -> None:
    *_, transport, _, lane, description = pair()
    transport.connect("p", description)
    copy = transport.post("p", [0], [0])
    lane.broken = True
    assert transport.poll(copy) is CopyState.FAILED and "illegal memory access" in copy.reason
    lane.broken = False
    assert transport.poll(copy) is CopyState.FAILED


@pytest.mark.parametrize(
    ("change", "words"),
    [({"boot": "x"}, "another host"), ({"page_bytes": 64}, "pages of 64 bytes"), ({"num_pages": "x"}, "not describe")],
)
def test_descriptions_that_do_not_fit_are_refused(change: dict[str, object], words: str) -> None:
    *_, transport, driver, _, description = pair(**change)
    with pytest.raises(TransportError, match=words):
        transport.connect("p", description)
    with pytest.raises(TransportError, match="not connected"):
        transport.post("p", [0], [0])
    assert driver.mapped == []


def test_a_peer_out_of_reach_is_refused_and_the_old_mapping_kept() -> None:
    *_, transport, driver, lane, description = pair()
    transport.connect("p", description)
    lane.reachable = False
    with pytest.raises(TransportError, match="no peer access"):
        transport.connect("p", description)
    lane.reachable, driver.refuses = True, "open"
    with pytest.raises(TransportError, match="INVALID_DEVICE"):
        transport.connect("q", description)
    assert len(driver.mapped) == 1
    for src, dst in (([8], [0]), ([0], [8]), ([-1], [0]), ([0, 1], [0])):
        with pytest.raises(TransportError):
            transport.post("p", src, dst)


@pytest.mark.parametrize(
    ("refuses", "words"), [("export", "cuIpcGetMemHandle"), ("allocation", "expandable segments must be off")]
)
def test_memory_that_cannot_be_exported_is_refused(refuses: str, words: str) -> None:
    memory = Memory(2, seed=1)
    driver = Driver(memory, refuses)
    with pytest.raises(TransportError, match=words):
        CudaIpcTransport(memory.region, driver, Lane())
    assert driver.closed


def test_the_self_test_compares_bytes() -> None:
    memory, lane = Memory(4, seed=1), Lane()
    transport = CudaIpcTransport(memory.region, Driver(memory), lane)
    transport.self_test()
    lane.wrong = True
    with pytest.raises(TransportError, match="other bytes"):
        transport.self_test()
    lane.broken = True
    with pytest.raises(TransportError, match="illegal memory access"):
        transport.self_test()


def test_pools_that_cannot_be_read_so() -> None:
    for region in (MemoryRegion(0, PAGE, 1, "cpu"), MemoryRegion(8, PAGE, 1, "cuda:0"), MemoryRegion(0, 24, 1, "cuda")):
        with pytest.raises(TransportError):
            CudaIpcTransport(region, Driver(Memory(1, 1)), Lane())


def test_it_is_chosen_on_one_host_before_all_others() -> None:
    *_, description = pair()
    elsewhere = pair(boot="x")[-1]
    both = {"cuda_ipc": description, "nixl": b""}
    assert same_host(both) and is_same_host(description)
    assert not same_host({"cuda_ipc": elsewhere, "nixl": b""}) and not is_same_host(b"\xc1")
    assert choose(["cuda_ipc", "nixl"], both, same_host=True) == "cuda_ipc"
    assert choose(["cuda_ipc", "nixl"], both, same_host=False) == "nixl"
    assert choose(["shm", "nixl"], both, same_host=True) == "nixl"


# ---------------------------------------------------------------- on GPUs, between two processes


@pytest.mark.gpu
@on_gpu
def test_a_pool_on_a_gpu_opens_it() -> None:
    pages = make_pages("cuda:0", 1 << 20, 8, first=0)
    transports = open_transports("cuda_ipc", pages.region, "worker")
    assert [transport.name for transport in transports] == ["cuda_ipc"]
    transports[0].close()


@pytest.mark.gpu
@pytest.mark.parametrize("page_bytes", [4096 + 16, 1 << 20])
@pytest.mark.parametrize("transport", ["cuda_ipc", "tcp"])
@pytest.mark.parametrize(("reader", "lender"), PAIRS)
def test_every_byte_arrives_from_another_process(reader: str, lender: str, transport: str, page_bytes: int) -> None:
    pages = CudaPages(reader, page_bytes, 64, first=1000)
    expected = pages.words.clone()
    opened = OPENERS[transport](pages.region, "reader")
    mover = PageMover(pages.region, [opened], checksum=lambda pages: [0 for _ in pages])
    other = LenderProcess(LinkSpec(transport, reader, lender, page_bytes, num_pages=64, passes=(1,)))
    try:
        description = other.description()
        for start in range(3):
            mover.connect("lender", transport, description)
            src = list(range(start, 64, 3))
            dst = [63 - 2 * i for i in range(len(src))]
            mover.read(ReadJob("read", "lender", transport, src, dst))
            (done,) = wait_for(mover, count(1))
            assert isinstance(done, ReadDone), done
            expected[dst] = torch.tensor(src, device=reader)[:, None]
            assert torch.equal(pages.words, expected)
            mover.disconnect("lender")
        assert mover.close()
    finally:
        other.close()
    pages.close()


@pytest.mark.gpu
@pytest.mark.parametrize(("reader", "lender"), PAIRS)
def test_a_killed_owner_settles_reads_and_leaves_this_process_alone(reader: str, lender: str) -> None:
    pages = CudaPages(reader, 1 << 20, 64, first=1000)
    mover = PageMover(pages.region, [CudaIpcTransport(pages.region)], checksum=lambda pages: [0 for _ in pages])
    victim, other = (LenderProcess(LinkSpec("cuda_ipc", reader, lender, 1 << 20, 64, passes=(1,))) for _ in range(2))
    try:
        mover.connect("victim", "cuda_ipc", victim.description())
        mover.connect("other", "cuda_ipc", other.description())
        mover.read(ReadJob("before", "victim", "cuda_ipc", range(64), range(64)))
        victim.kill()
        mover.read(ReadJob("after", "victim", "cuda_ipc", range(64), range(64)))
        settled = wait_for(mover, count(2))
        assert all(isinstance(done, ReadDone | ReadFailed) for done in settled), settled
        mover.disconnect("victim")
        pages.fill()
        mover.read(ReadJob("other", "other", "cuda_ipc", [5], [9]))
        assert isinstance(wait_for(mover, count(1))[0], ReadDone)
        assert pages.ends()[[8, 9]].tolist() == [[1008, 1008], [5, 5]]
        assert mover.close()
    finally:
        victim.close()
        other.close()
    pages.close()


@pytest.mark.gpu
@pytest.mark.parametrize(("reader", "lender"), PAIRS)
def test_the_link_is_measured(reader: str, lender: str) -> None:
    spec = LinkSpec("cuda_ipc", reader, lender, 2 << 20, num_pages=128, passes=(1, 64), repeats=3)
    times: list[PassTime] = measure(spec, timeout_s=90)
    assert [one.pages for one in times] == [1, 64]
