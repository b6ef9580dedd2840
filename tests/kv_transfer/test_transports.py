"""All transports of CPU memory between processes: exact bytes, damage noticed, peers that die or stop, nothing left."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penstock.kv_transfer.base import TransportError
from penstock.kv_transfer.mover import (
    ConnectFailed,
    ReadDone,
    ReadFailed,
    ReadJob,
    ReadMismatch,
    ReadSettled,
    ReadStalled,
)
from penstock.kv_transfer.select import OPENERS
from penstock.kv_transfer.shm import ShmTransport
from tests.kv_transfer.conftest import Reader, StartLender
from tests.kv_transfer.pools import Pool, contents, count, sums, wait_for

LINKS = [("shm", ""), ("nixl", ""), ("nixl", "tcp"), ("tcp", "")]


@pytest.mark.parametrize(("transport", "ucx_tls"), LINKS)
@pytest.mark.parametrize("page_bytes", [4096, 12288, 1 << 20])
def test_scattered_pages_arrive_exactly(
    transport: str,
    ucx_tls: str,
    page_bytes: int,
    lend: StartLender,
    read_with: Callable[..., Reader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TLS", ucx_tls or "all")
    source = contents(page_bytes, 40, seed=1)
    lender = lend(transport, page_bytes, 40, ucx_tls=ucx_tls)
    pool, mover = read_with(transport, page_bytes, 64)
    order = random.Random(page_bytes)
    src = [3, 4, 5, 0, *order.sample(range(6, 40), 20)]
    dst = [7, 8, 9, 10, *order.sample(range(11, 64), 20)]
    mover.connect(lender.incarnation, transport, lender.description)
    mover.read(ReadJob("one", lender.incarnation, transport, src, dst, sums(source[src])))
    (done,) = wait_for(mover, count(1))
    assert isinstance(done, ReadDone) and done.tag == "one" and done.size_bytes == 24 * page_bytes
    expected = np.zeros_like(pool.pages)
    expected[dst] = source[src]
    assert np.array_equal(pool.pages, expected)  # other pages untouched


@pytest.mark.parametrize(("transport", "ucx_tls"), LINKS)
def test_a_peer_can_be_left_and_joined_again(
    transport: str, ucx_tls: str, lend: StartLender, read_with: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", ucx_tls or "all")
    source = contents(65536, 4, seed=1)
    lender = lend(transport, 65536, 4, ucx_tls=ucx_tls)
    pool, mover = read_with(transport, 65536, 4)
    for page in range(3):
        mover.connect(lender.incarnation, transport, lender.description)
        mover.read(ReadJob("read", lender.incarnation, transport, [page], [page]))
        assert isinstance(wait_for(mover, count(1))[0], ReadDone)
        mover.disconnect(lender.incarnation)
    assert np.array_equal(pool.pages[:3], source[:3])


@pytest.mark.parametrize("transport", ["shm", "nixl", "tcp"])
def test_one_flipped_byte_is_seen(transport: str, lend: StartLender, read_with: Callable[..., Reader]) -> None:
    source = contents(65536, 8, seed=1)
    lender = lend(transport, 65536, 8)
    lender.flip_byte(page=5, offset=4321)
    _, mover = read_with(transport, 65536, 8)
    mover.connect(lender.incarnation, transport, lender.description)
    mover.read(ReadJob("bad", lender.incarnation, transport, range(8), [7, 6, 5, 4, 3, 2, 1, 0], sums(source)))
    mover.read(ReadJob("unchecked", lender.incarnation, transport, [5], [2]))
    heard = {c.tag: c for c in wait_for(mover, count(2)) if not isinstance(c, ConnectFailed)}
    assert heard["bad"] == ReadMismatch("bad", pages=[2])
    assert isinstance(heard["unchecked"], ReadDone)


def test_shared_pages_outlive_their_owner(lend: StartLender, read_with: Callable[..., Reader]) -> None:
    source = contents(65536, 32, seed=1)
    lender = lend("shm", 65536, 32)
    _, mover = read_with("shm", 65536, 32)
    mover.connect(lender.incarnation, "shm", lender.description)
    mover.read(ReadJob("before", lender.incarnation, "shm", [0], [0]))
    wait_for(mover, count(1))
    lender.send(signal.SIGKILL)
    mover.read(ReadJob("after", lender.incarnation, "shm", range(32), range(32), sums(source)))
    assert isinstance(wait_for(mover, count(1))[0], ReadDone)
    mover.connect("again", "shm", lender.description)
    (refused,) = wait_for(mover, count(1))
    assert isinstance(refused, ConnectFailed) and refused.peer == "again"


@pytest.mark.parametrize(("transport", "ucx_tls"), [("nixl", ""), ("nixl", "tcp"), ("tcp", "")])
def test_killed_peer_fails_reads_and_leaves_the_rest_alone(
    transport: str, ucx_tls: str, lend: StartLender, read_with: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that end well have the right bytes, the others are settled failures; another peer is not disturbed."""
    monkeypatch.setenv("UCX_TLS", ucx_tls or "all")
    page_bytes, num_pages = 1 << 20, 32
    source = contents(page_bytes, num_pages, seed=1)
    victim, other = (lend(transport, page_bytes, num_pages, ucx_tls=ucx_tls) for _ in range(2))
    pool, mover = read_with(transport, page_bytes, num_pages)
    for lender in (victim, other):
        mover.connect(lender.incarnation, transport, lender.description)
        mover.read(ReadJob(f"warm-{lender.incarnation}", lender.incarnation, transport, [0], [0]))
    wait_for(mover, count(2))
    for i in range(16):
        mover.read(ReadJob(str(i), victim.incarnation, transport, [2 * i, 2 * i + 1], [2 * i, 2 * i + 1]))
    heard = wait_for(mover, count(1))
    victim.send(signal.SIGKILL)
    mover.read(ReadJob("late", victim.incarnation, transport, [1], [1]))
    heard += wait_for(mover, count(17 - len(heard)))
    for completion in heard:
        assert isinstance(completion, ReadDone | ReadFailed)
        if isinstance(completion, ReadDone):
            pages = slice(2 * int(completion.tag), 2 * int(completion.tag) + 2)
            assert np.array_equal(pool.pages[pages], source[pages])
    assert isinstance(next(c for c in heard if isinstance(c, ReadDone | ReadFailed) and c.tag == "late"), ReadFailed)
    mover.disconnect(victim.incarnation)
    mover.read(ReadJob("other", other.incarnation, transport, [9], [9], sums(source[[9]])))
    assert isinstance(wait_for(mover, count(1))[0], ReadDone)


def test_stopped_peer_stalls_and_settles_when_it_goes_on(
    lend: StartLender, read_with: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hazard that quarantine is for: the bytes land long after the read was given up."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    page_bytes, num_pages = 1 << 20, 8
    source = contents(page_bytes, num_pages, seed=1)
    lender = lend("nixl", page_bytes, num_pages, ucx_tls="tcp")
    pool, mover = read_with("nixl", page_bytes, num_pages, stall_s=3.0)
    mover.connect(lender.incarnation, "nixl", lender.description)
    mover.read(ReadJob("warm", lender.incarnation, "nixl", [0], [0]))
    wait_for(mover, count(1))
    lender.send(signal.SIGSTOP)
    mover.read(ReadJob("stuck", lender.incarnation, "nixl", range(1, 8), range(1, 8)))
    (stalled,) = wait_for(mover, count(1))
    assert isinstance(stalled, ReadStalled) and stalled.tag == "stuck"
    mover.disconnect(lender.incarnation)  # must wait for the copy
    mover.connect(lender.incarnation, "nixl", lender.description + b" ")
    (busy,) = wait_for(mover, count(1))  # nothing settled meanwhile
    assert isinstance(busy, ConnectFailed) and "not settled" in busy.reason
    assert not np.array_equal(pool.pages[1], source[1])
    lender.send(signal.SIGCONT)
    assert wait_for(mover, count(1)) == [ReadSettled("stuck")]
    assert np.array_equal(pool.pages[1], source[1])  # in the first batch, which is small
    assert not pool.pages[4:].any()  # nothing more is posted of a read that was given up


def test_stopped_peer_then_killed_settles(
    lend: StartLender, read_with: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    lender = lend("nixl", 1 << 20, 8, ucx_tls="tcp")
    _, mover = read_with("nixl", 1 << 20, 8, stall_s=3.0)
    mover.connect(lender.incarnation, "nixl", lender.description)
    mover.read(ReadJob("warm", lender.incarnation, "nixl", [0], [0]))
    wait_for(mover, count(1))
    lender.send(signal.SIGSTOP)
    mover.read(ReadJob("stuck", lender.incarnation, "nixl", range(8), range(8)))
    assert isinstance(wait_for(mover, count(1))[0], ReadStalled)
    lender.send(signal.SIGKILL)
    assert wait_for(mover, count(1)) == [ReadSettled("stuck")]


@pytest.mark.parametrize("transport", ["shm", "nixl", "tcp"])
def test_descriptions_that_do_not_fit_are_refused(transport: str, lend: StartLender) -> None:
    lender = lend(transport, 8192, 4)
    pool = Pool(4096, 4)
    reader = OPENERS[transport](pool.region, "reader")
    for description in (lender.description, b"", b"\xc1", lender.description[: len(lender.description) // 2]):
        with pytest.raises(TransportError):
            reader.connect("peer", description)
    with pytest.raises(TransportError):
        reader.post("peer", [0], [0])
    reader.close()
    pool.close()


@pytest.mark.parametrize("transport", ["shm", "nixl", "tcp"])
def test_impossible_copies_are_refused_and_write_nothing(transport: str, lend: StartLender) -> None:
    lender = lend(transport, 4096, 4)
    pool = Pool(4096, 6)
    reader = OPENERS[transport](pool.region, "reader")
    reader.connect("peer", lender.description)
    for src, dst in (([4], [0]), ([0], [6]), ([-1], [0]), ([0], [-1]), ([0, 1], [0])):
        with pytest.raises(TransportError):
            reader.post("peer", src, dst)
    reader.close()
    assert not pool.pages.any()
    pool.close()


def test_a_descriptor_that_is_another_file_is_not_mapped() -> None:
    """As after the process id or the descriptor number has changed hands."""
    pool, impostor = Pool(4096, 2, name="penstock-old"), Pool(4096, 2, name="penstock-new")
    reader = ShmTransport(pool.region)
    description = reader.description()
    os.dup2(impostor.fd, pool.fd, inheritable=False)
    with pytest.raises(TransportError, match="is not"):
        reader.connect("self", description)
    reader.close()
    pool.close()
    impostor.close()


@pytest.mark.parametrize("transport", ["shm", "nixl", "tcp"])
def test_nothing_is_left_behind(transport: str, lend: StartLender) -> None:
    lender = lend(transport, 65536, 16)

    def cycle() -> None:
        pool = Pool(65536, 16)
        reader = OPENERS[transport](pool.region, "reader")
        reader.connect("peer", lender.description)
        copy = reader.post("peer", range(16), range(16))
        while reader.poll(copy).value == "pending":
            pass
        reader.connect("peer", lender.description)  # replaces the first connection
        reader.close()
        pool.close()

    def held() -> tuple[int, int, int]:
        maps = Path("/proc/self/maps").read_text().count("memfd:penstock")
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps

    cycle()  # what UCX sets up once a process
    before = held()
    for _ in range(3):
        cycle()
    deadline = time.monotonic() + 10.0  # the system lists a thread for a moment after it was joined
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, (held(), before)
        time.sleep(0.01)
