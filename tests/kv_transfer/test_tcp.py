"""Reading over TCP: whoever dies, stops, lies or is cut off, the others go on, and what was lost is opened again."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from penstock.common.config import WorkerConfig
from penstock.common.errors import ConfigError
from penstock.common.memory import MemoryRegion
from penstock.kv_transfer import page_server
from penstock.kv_transfer.base import CopyState, TransportError
from penstock.kv_transfer.joint import ExchangeJoint
from penstock.kv_transfer.mover import ConnectFailed, PageMover, ReadDone, ReadFailed, ReadJob, ReadSettled, ReadStalled
from penstock.kv_transfer.page_window import _PoolWindow
from penstock.kv_transfer.select import open_transports, rdma_devices
from penstock.kv_transfer.tcp import Listen, TcpPool, TcpTransport
from tests.forking import ForkedPython
from tests.kv_transfer.conftest import Reader, StartLender
from tests.kv_transfer.pools import Pool, contents, count, sums, wait_for

PAGE_BYTES, PAGES = 65536, 32
LIMIT_S = 30.0


@contextmanager
def lending(num_pages: int = PAGES) -> Iterator[tuple[Pool, TcpTransport]]:
    """A pool of known bytes in this process, and its server."""
    pool = Pool(PAGE_BYTES, num_pages, seed=1)
    transport = TcpTransport(pool.region)
    try:
        yield pool, transport
    finally:
        transport.close()
        pool.close()


def read(reader: TcpTransport, peer: str, pages: range) -> CopyState:
    """Onto the same pages of our own."""
    copy = reader.post(peer, pages, pages)
    deadline = time.monotonic() + LIMIT_S
    while (state := reader.poll(copy)) is CopyState.PENDING:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return state


def test_readers_that_are_killed_while_they_read_do_not_harm_their_lender(
    lend: StartLender, read_with: Callable[..., Reader]
) -> None:
    """Over UCX's TCP a quarter of such deaths ended the lender's process."""
    lender = lend("tcp", PAGE_BYTES, PAGES)
    command = [sys.executable, "-m", "tests.kv_transfer.endless_reader", "tcp", lender.incarnation]
    command += [lender.description.hex(), str(PAGE_BYTES), str(PAGES)]
    readers = [ForkedPython(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) for _ in range(4)]
    for victim in readers:
        assert victim.stdout is not None and victim.stdout.readline() == b"reading\n"
    for victim in readers:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert victim.stdout is not None
        victim.stdout.close()
    pool, mover = read_with("tcp", PAGE_BYTES, PAGES)
    mover.connect(lender.incarnation, "tcp", lender.description)
    mover.read(ReadJob("after", lender.incarnation, "tcp", range(PAGES), range(PAGES)))
    assert isinstance(wait_for(mover, count(1))[0], ReadDone)
    assert np.array_equal(pool.pages, contents(PAGE_BYTES, PAGES, seed=1))
    assert lender.process.poll() is None


def test_reads_of_a_stopped_lender_settle_when_it_is_given_up(
    lend: StartLender, read_with: Callable[..., Reader]
) -> None:
    """Nothing lands late: the socket is closed."""
    size = 8 << 20
    source = contents(size, 4, seed=1)
    lender = lend("tcp", size, 4)
    pool, mover = read_with("tcp", size, 4, stall_s=3.0)
    mover.connect(lender.incarnation, "tcp", lender.description)
    mover.read(ReadJob("warm", lender.incarnation, "tcp", [0], [0]))
    assert isinstance(wait_for(mover, count(1))[0], ReadDone)
    lender.send(signal.SIGSTOP)
    mover.read(ReadJob("stuck", lender.incarnation, "tcp", range(1, 4), range(1, 4)))
    assert isinstance(wait_for(mover, count(1))[0], ReadStalled)
    mover.disconnect(lender.incarnation)
    assert wait_for(mover, count(1)) == [ReadSettled("stuck")]
    before = pool.pages[1:].copy()
    lender.send(signal.SIGCONT)
    mover.connect(lender.incarnation, "tcp", lender.description)
    mover.read(ReadJob("again", lender.incarnation, "tcp", [0], [0], sums(source[[0]])))
    assert isinstance(wait_for(mover, count(1))[0], ReadDone)
    assert np.array_equal(pool.pages[1:], before)


@pytest.mark.parametrize("transport", ["tcp", "nixl"])
def test_a_connection_that_is_cut_is_opened_again_while_the_peer_is_linked(
    transport: str, lend: StartLender, read_with: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall may end one; the bus, another connection, does not show it."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    source = contents(PAGE_BYTES, 4, seed=1)
    lender = lend(transport, PAGE_BYTES, 4, ucx_tls="tcp")
    before = set(os.listdir("/proc/self/fd"))
    pool, mover = read_with(transport, PAGE_BYTES, 4)
    mover.connect(lender.incarnation, transport, lender.description)
    mover.read(ReadJob("warm", lender.incarnation, transport, [0], [0]))
    assert isinstance(wait_for(mover, count(1))[0], ReadDone)
    assert _cut_connections(set(os.listdir("/proc/self/fd")) - before)
    deadline = time.monotonic() + LIMIT_S
    for attempt in range(1000):
        mover.read(ReadJob(str(attempt), lender.incarnation, transport, [1], [1], sums(source[[1]])))
        (heard,) = wait_for(mover, count(1))
        if isinstance(heard, ReadDone):
            break
        assert isinstance(heard, ReadFailed) and time.monotonic() < deadline
        time.sleep(0.02)
    assert np.array_equal(pool.pages[:2], source[:2])


def _cut_connections(descriptors: set[str]) -> int:
    """Shut down the connected TCP sockets among these; how many."""
    cut = 0
    for name in descriptors:
        try:
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # no socket, or closed meanwhile
            continue
        with found:
            try:
                if found.family == socket.AF_INET and found.getpeername():
                    found.shutdown(socket.SHUT_RDWR)
                    cut += 1
            except OSError:  # listening
                continue
    return cut


@pytest.mark.parametrize(
    "said",
    [
        b"x" * page_server.KEY_BYTES,  # a wrong key
        struct.pack("<I", 0),
        struct.pack("<I", PAGES + 1),
        struct.pack("<II", 1, PAGES),
        struct.pack("<I", 0xFFFFFFFF),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_whoever_speaks_otherwise_is_turned_away(said: bytes) -> None:
    with lending() as (pool, transport), lending() as (own, reader):
        own.pages[:] = 0
        where = msgspec.msgpack.decode(transport.description(), type=TcpPool)
        with socket.create_connection((where.host, where.port), LIMIT_S) as stranger:
            stranger.sendall((b"" if len(said) >= page_server.KEY_BYTES else where.key) + said)
            with suppress(ConnectionResetError):  # there was more than it had read
                assert stranger.recv(1) == b""
        reader.connect("peer", transport.description())
        assert read(reader, "peer", range(PAGES)) is CopyState.DONE
        assert np.array_equal(own.pages, pool.pages)


def test_a_stranger_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "_KEY_S", 0.1)
    with lending() as (_, transport):
        where = msgspec.msgpack.decode(transport.description(), type=TcpPool)
        with socket.create_connection((where.host, where.port), LIMIT_S) as stranger:
            stranger.sendall(where.key[:3])
            assert stranger.recv(1) == b""


def test_a_peer_that_is_read_long_after_it_was_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first hand-off behind a queue: the server must not have taken its reader for a stranger."""
    monkeypatch.setattr(page_server, "_KEY_S", 0.05)
    with lending() as (pool, transport), lending() as (own, reader):
        own.pages[:] = 0
        reader.connect("peer", transport.description())
        time.sleep(0.2)
        assert read(reader, "peer", range(PAGES)) is CopyState.DONE
        time.sleep(0.2)  # nor one that has nothing to ask
        assert read(reader, "peer", range(PAGES)) is CopyState.DONE
        assert np.array_equal(own.pages, pool.pages)


def test_a_connection_that_ended_while_it_was_idle_costs_no_read() -> None:
    with lending() as (pool, transport), lending() as (own, reader):
        own.pages[:] = 0
        before = set(os.listdir("/proc/self/fd"))
        reader.connect("peer", transport.description())
        assert read(reader, "peer", range(1)) is CopyState.DONE
        assert _cut_connections(set(os.listdir("/proc/self/fd")) - before)
        assert read(reader, "peer", range(PAGES)) is CopyState.DONE
        assert np.array_equal(own.pages, pool.pages)


def test_strangers_do_not_keep_readers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "_MOST_CONNECTIONS", 4)
    with lending() as (pool, transport), lending() as (own, reader), ExitStack() as strangers:
        own.pages[:] = 0
        where = msgspec.msgpack.decode(transport.description(), type=TcpPool)
        for _ in range(8):
            strangers.enter_context(socket.create_connection((where.host, where.port), LIMIT_S))
        reader.connect("peer", transport.description())
        assert read(reader, "peer", range(PAGES)) is CopyState.DONE
        assert np.array_equal(own.pages, pool.pages)


def test_without_descriptors_readers_are_served_and_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener:
        """Has no descriptor for the next three."""

        def __init__(self, real: socket.socket) -> None:
            self.real, self.refusals = real, 3

        def accept(self) -> tuple[socket.socket, Any]:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return self.real.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    monkeypatch.setattr(page_server, "_PAUSE_S", 0.01)
    create = socket.create_server
    monkeypatch.setattr(page_server.socket, "create_server", lambda *a, **k: Listener(create(*a, **k)))
    with lending() as (pool, transport), lending() as (own, reader):
        own.pages[:] = 0
        reader.connect("peer", transport.description())
        assert read(reader, "peer", range(PAGES)) is CopyState.DONE
        assert np.array_equal(own.pages, pool.pages)


def test_a_fault_while_one_reader_is_served_is_that_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    views, faults = _PoolWindow.views, [RuntimeError("the device has failed")]

    def fail_once(self: _PoolWindow, pages: Sequence[int], skip: int) -> list[memoryview]:
        if faults and threading.current_thread().name == "page-server":
            raise faults.pop()
        return views(self, pages, skip)

    monkeypatch.setattr(_PoolWindow, "views", fail_once)
    with lending() as (pool, transport), lending() as (own, reader):
        own.pages[:] = 0
        reader.connect("peer", transport.description())
        assert read(reader, "peer", range(PAGES)) is CopyState.FAILED
        assert read(reader, "peer", range(PAGES)) is CopyState.DONE
        assert np.array_equal(own.pages, pool.pages)
        transport.progress()


def test_a_server_that_has_died_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: page_server.PageServer) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(page_server.PageServer, "_accept", fail)
    with lending() as (_, transport):
        where = msgspec.msgpack.decode(transport.description(), type=TcpPool)
        with suppress(ConnectionResetError), socket.create_connection((where.host, where.port), LIMIT_S) as stranger:
            assert stranger.recv(1) == b""
        with pytest.raises(RuntimeError, match="page server has died"):
            transport.progress()


def test_a_mover_that_ends_waits_for_no_stopped_lender(lend: StartLender) -> None:
    lender = lend("tcp", 8 << 20, 4)
    pool = Pool(8 << 20, 4)
    mover = PageMover(pool.region, [TcpTransport(pool.region)])
    mover.connect(lender.incarnation, "tcp", lender.description)
    mover.read(ReadJob("warm", lender.incarnation, "tcp", [0], [0]))
    wait_for(mover, count(1))
    lender.send(signal.SIGSTOP)
    mover.read(ReadJob("stuck", lender.incarnation, "tcp", range(4), range(4)))
    assert mover.close()  # False: something may still write
    lender.send(signal.SIGCONT)
    pool.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_pages_are_read_at_an_address_whatever_name_the_bus_has(host: str) -> None:
    pool = OnePage()
    joint: Any = ExchangeJoint(WorkerConfig(model="tiny", bus_host=host, kv_transport="tcp"), None, None)  # type: ignore[arg-type]
    described = joint.open_transports(pool, "worker")
    assert msgspec.msgpack.decode(described["tcp"], type=TcpPool).host in ("127.0.0.1", "::1")
    joint.close_transports()
    pool.pool.close()


def test_a_reader_that_takes_nothing_does_not_hold_up_another() -> None:
    with lending(400) as (pool, transport), lending(400) as (own, reader):
        own.pages[:] = 0
        where = msgspec.msgpack.decode(transport.description(), type=TcpPool)
        with socket.create_connection((where.host, where.port), LIMIT_S) as lazy:
            lazy.sendall(where.key + struct.pack("<401I", 400, *range(400)))
            reader.connect("peer", transport.description())
            assert read(reader, "peer", range(400)) is CopyState.DONE
            assert np.array_equal(own.pages, pool.pages)


def test_a_peer_that_is_not_there(read_with: Callable[..., Reader]) -> None:
    _, mover = read_with("tcp", PAGE_BYTES, 2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    gone = msgspec.msgpack.encode(TcpPool("127.0.0.1", port, bytes(16), PAGE_BYTES, 2))
    mover.connect("gone", "tcp", gone)
    mover.read(ReadJob("one", "gone", "tcp", [0], [0]))
    heard = [wait_for(mover, count(1))[-1]]
    if isinstance(heard[0], ConnectFailed):
        heard += wait_for(mover, count(1))
    failed = heard[-1]
    assert isinstance(failed, ReadFailed) and ("gone" in failed.reason)


def test_where_it_listens() -> None:
    pool = Pool(PAGE_BYTES, 1)
    first = TcpTransport(pool.region, Listen(announced="10.1.2.3"))
    where = msgspec.msgpack.decode(first.description(), type=TcpPool)
    assert where.host == "10.1.2.3"
    for port in (where.port, 70000):
        with pytest.raises(TransportError, match=f"cannot listen on 127.0.0.1 port {port}"):
            TcpTransport(pool.region, Listen(port=port))
    with pytest.raises(TransportError, match="in use"):  # auto leaves out what does not work, but not what is asked for
        open_transports("auto", pool.region, "worker", Listen(port=where.port))
    first.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "page-server"]
    pool.close()


class OnePage:
    """An engine's pool, as far as transports see it."""

    def __init__(self) -> None:
        self.pool = Pool(PAGE_BYTES, 1)

    def region(self) -> MemoryRegion:
        return self.pool.region

    def checksum(self) -> Callable[[Sequence[int]], list[int]]:
        raise AssertionError("nothing is sealed")


def test_a_port_that_is_taken_is_an_error_of_the_configuration() -> None:
    pool = OnePage()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = WorkerConfig(model="tiny", kv_port=taken.getsockname()[1])
        joint: Any = ExchangeJoint(config, None, None)  # type: ignore[arg-type]  # nothing is joined
        with pytest.raises(ConfigError, match="kv_transport auto: cannot listen on"):
            joint.open_transports(pool, "worker")
    pool.pool.close()


def test_rdma_devices_have_a_link(tmp_path: Path) -> None:
    for device, state in (("mlx5_0", "4: ACTIVE\n"), ("mlx5_1", "1: DOWN\n")):
        port = tmp_path / "sys/class/infiniband" / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
    assert rdma_devices(tmp_path) == []  # a container that sees the host's, and may not use them
    verbs = tmp_path / "dev/infiniband"
    verbs.mkdir(parents=True)
    (verbs / "uverbs0").touch()
    assert rdma_devices(tmp_path) == ["mlx5_0"]
