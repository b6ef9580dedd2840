"""TCP sockets of our own, for hosts that share no RDMA: the owner of pages sends them, and only their reader writes.

UCX emulates reads over TCP, and aborts the lender's process when a reader dies before it was answered
(docs/transfer.md). Here a lost connection is only that. One thread of the lender answers all of its readers; a reader
is a socket that the mover's thread empties straight into the pool. So nothing writes into our pages but ourselves, and
a copy can be ended at any moment by closing its socket.

What goes over a connection, integers little-endian: from the reader the pool's key, once; then, any number of times,
how many pages and which (uint32 each), answered by the bytes of these pages in order. Anything else closes it. The key
travels in the pool's description, over the bus; pages are not encrypted, as over RDMA.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import Copy, CopyState, Transport, TransportError, check_pages
from penstock.kv_transfer.page_server import KEY_BYTES, PageServer
from penstock.kv_transfer.page_window import PageWindow, open_window

_TURN_BYTES = 8 << 20  # that one look at a copy takes in at most: others wait meanwhile
_OPTIONS = {
    socket.TCP_NODELAY: 1,
    # A host that is gone is noticed within 15 s, whether it is being connected to, asked or listened to.
    socket.TCP_SYNCNT: 3,
    socket.TCP_USER_TIMEOUT: 15_000,  # ms
    socket.TCP_KEEPIDLE: 5,
    socket.TCP_KEEPINTVL: 2,
    socket.TCP_KEEPCNT: 5,
}


@dataclass(frozen=True)
class Listen:
    """Where readers find us."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any
    announced: str = ""  # what they are told instead of host


ON_LOOPBACK = Listen()


class TcpPool(msgspec.Struct, frozen=True):
    """What a peer needs to read our pool."""

    host: str
    port: int
    key: bytes
    page_bytes: int
    num_pages: int


class TcpCopy(Copy):
    """Pages that were asked for, and how far they have come."""

    def __init__(self, peer: str, page_bytes: int, dst_pages: Sequence[int]) -> None:
        super().__init__(peer, len(dst_pages) * page_bytes)
        self.dst_pages = dst_pages
        self.stored = 0  # pages that are where they belong
        self.received = 0  # bytes of those behind them, up to a window
        self.state = CopyState.PENDING if dst_pages else CopyState.DONE


class _Connection:
    """One socket to a peer, and the copies asked for over it, in order."""

    def __init__(self, pool: TcpPool, region: MemoryRegion) -> None:
        """Begins to connect, without waiting; what comes goes into `region`. Raises OSError."""
        family, kind, protocol, _, address = socket.getaddrinfo(
            pool.host, pool.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        self.copies: deque[TcpCopy] = deque()
        self._region = region
        self._window: PageWindow | None = None  # opened when something is asked for
        self._unsent = bytearray(pool.key)
        self._socket = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _OPTIONS.items():
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
            status = self._socket.connect_ex(address)
            if status not in (0, errno.EINPROGRESS):
                raise OSError(status, os.strerror(status))
        except OSError:
            self._socket.close()
            raise

    def ask(self, copy: TcpCopy, src_pages: Sequence[int]) -> None:
        if self._window is None:
            self._window = open_window(self._region)
        self.copies.append(copy)
        self._unsent += struct.pack(f"<{1 + len(src_pages)}I", len(src_pages), *src_pages)

    def is_lost(self) -> bool:
        """Of a connection over which nothing is asked: whether the other side has ended it, or it says something."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def pump(self) -> None:
        """Send what is to be sent and take in what has come, as far as that goes without waiting.

        Raises:
            OSError: the connection is lost.
        """
        with suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        taken = 0
        with suppress(BlockingIOError):
            while self.copies and taken < _TURN_BYTES:
                assert self._window is not None
                taken += self._take(self.copies[0], self._window)

    def close(self) -> None:
        self._socket.close()
        if self._window is not None:
            self._window.close()

    def _take(self, copy: TcpCopy, window: PageWindow) -> int:
        """Receive into the next pages of a copy; bytes."""
        pages = copy.dst_pages[copy.stored : copy.stored + window.num_pages]
        views = window.views(pages, copy.received)
        count = self._socket.recvmsg_into(views)[0]
        if count == 0:
            raise ConnectionResetError(errno.ECONNRESET, "closed by the other side")
        copy.received += count
        whole = copy.received // window.page_bytes
        if whole == len(pages) or (whole and not window.staged):
            window.store(pages[:whole])
            copy.stored += whole
            copy.received -= whole * window.page_bytes
            if copy.stored == len(copy.dst_pages):
                copy.state = CopyState.DONE
                self.copies.popleft()
        return count


class _Peer:
    """A peer, and the connection to it while there is one."""

    def __init__(self, pool: TcpPool) -> None:
        self.pool = pool
        self.connection: _Connection | None = None


class TcpTransport(Transport):
    """Reads over TCP, and a server that lets others read. `post` connects, and connects again after a connection was
    lost."""

    name = "tcp"
    unknown_link = True

    def __init__(self, region: MemoryRegion, listen: Listen = ON_LOOPBACK) -> None:
        """Serves the region from now on.

        Raises:
            TransportError: the address cannot be listened on, or the region's device not be used.
        """
        self._region = region
        self._announced = listen.announced or listen.host
        self._key = secrets.token_bytes(KEY_BYTES)
        open_window(region).close()  # whether that works here
        self._peers: dict[str, _Peer] = {}
        try:
            if not 0 <= listen.port < 1 << 16:
                raise OSError("there is no such port")
            self._server = PageServer(listen.host, listen.port, self._key, region)
        except OSError as error:
            raise TransportError(f"cannot listen on {listen.host} port {listen.port}: {error}") from error

    def description(self) -> bytes:
        region = self._region
        pool = TcpPool(self._announced, self._server.port, self._key, region.page_bytes, region.num_pages)
        return msgspec.msgpack.encode(pool)

    def connect(self, peer: str, description: bytes) -> None:
        """Does not connect yet: who connects and asks nothing is a stranger. Whether the peer can be reached shows
        when it is read."""
        try:
            pool = msgspec.msgpack.decode(description, type=TcpPool)
        except msgspec.MsgspecError as error:
            raise TransportError(f"{peer} does not describe a pool read over TCP: {error}") from error
        if pool.page_bytes != self._region.page_bytes:
            raise TransportError(f"{peer} has pages of {pool.page_bytes} bytes, ours {self._region.page_bytes}")
        if len(pool.key) != KEY_BYTES:
            raise TransportError(f"{peer} describes a pool without its key")
        self.disconnect(peer)
        self._peers[peer] = _Peer(pool)

    def disconnect(self, peer: str) -> None:
        self.sever(peer)
        self._peers.pop(peer, None)

    def sever(self, peer: str) -> None:
        known = self._peers.get(peer)
        if known is not None:
            self._lose(known, "cancelled")

    def post(self, peer: str, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Copy:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError(f"{peer} is not connected")
        check_pages(src_pages, known.pool.num_pages, dst_pages, self._region.num_pages)
        copy = TcpCopy(peer, self._region.page_bytes, dst_pages)
        if copy.state is CopyState.PENDING:
            connection = known.connection
            if connection is not None and not connection.copies and connection.is_lost():
                self._lose(known, "closed meanwhile")
            self._open(peer, known).ask(copy, src_pages)
            self._pump(known)
        return copy

    def poll(self, copy: Copy) -> CopyState:
        assert isinstance(copy, TcpCopy)
        known = self._peers.get(copy.peer)
        if copy.state is CopyState.PENDING and known is not None:
            self._pump(known)
        return copy.state

    def progress(self) -> None:
        """The server has a thread of its own. Raises RuntimeError if that has died."""
        if self._server.failure is not None:
            raise RuntimeError("the page server has died") from self._server.failure

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        self._server.close()

    def _open(self, peer: str, known: _Peer) -> _Connection:
        """The peer's connection, a new one if there is none."""
        if known.connection is None:
            try:
                known.connection = _Connection(known.pool, self._region)
            except OSError as error:
                raise TransportError(f"{peer} cannot be reached: {error.strerror or error}") from error
        return known.connection

    def _pump(self, known: _Peer) -> None:
        if known.connection is not None:
            try:
                known.connection.pump()
            except OSError as error:
                self._lose(known, error.strerror or str(error))

    def _lose(self, known: _Peer, reason: str) -> None:
        """Close the connection: with it nobody writes for its copies any more."""
        connection, known.connection = known.connection, None
        if connection is not None:
            connection.close()
            for copy in connection.copies:
                copy.reason = f"the connection to {copy.peer} was lost: {reason}"
                copy.state = CopyState.FAILED
