"""Answers readers over TCP out of a pool (the protocol: tcp.py). One thread, whatever happens to whom."""

from __future__ import annotations

import errno
import hmac
import logging
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.page_window import PageWindow, open_window

logger = logging.getLogger("penstock.kv_transfer")

KEY_BYTES = 16
_MOST_CONNECTIONS = 1024  # of peers, which have one each, and of whoever else finds the port
_MOST_BYTES = 4 << 20  # that a turn hands to one connection: others wait meanwhile
_KEY_S = 5.0  # until a connection has shown the key
_PAUSE_S = 0.1  # before the next try where there are no descriptors left
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_OPTIONS = {
    socket.TCP_NODELAY: 1,
    # A reader whose host is gone: within a minute, however slow the link.
    socket.TCP_USER_TIMEOUT: 60_000,  # ms
    socket.TCP_KEEPIDLE: 30,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 6,
}


class _Violation(Exception):
    """A reader says what no reader of ours says."""


class _Reader:
    """A connection: what it asks for, and how much of that it has got. It asks again when it has all."""

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.socket = connection
        self.since = now
        self.pages: Sequence[int] = ()  # asked for, less those that are sent
        self._window: PageWindow | None = None  # of a reader that has shown the key
        self._loaded = False  # the first of `pages` are in the window
        self._sent = 0  # bytes of these
        self._asked = bytearray()

    @property
    def events(self) -> int:
        return selectors.EVENT_WRITE if self.pages else selectors.EVENT_READ

    @property
    def admitted(self) -> bool:
        return self._window is not None

    def hear(self, key: bytes, region: MemoryRegion) -> None:
        """Read on to the next list of pages; `pages` then has them.

        Raises:
            _Violation: a wrong key, or a list that the pool has not. OSError: the connection is lost.
        """
        wanted = 4 if self.admitted else KEY_BYTES
        if self.admitted and len(self._asked) >= 4:
            wanted += 4 * struct.unpack_from("<I", self._asked)[0]
        received = self.socket.recv(wanted - len(self._asked))
        if not received:
            raise ConnectionResetError("closed by the reader")
        self._asked += received
        if len(self._asked) < wanted:
            return
        if not self.admitted:
            if not hmac.compare_digest(self._asked, key):
                raise _Violation("a wrong key")
            self._window = open_window(region)
        elif wanted == 4:
            (count,) = struct.unpack("<I", self._asked)
            if not 0 < count <= region.num_pages:
                raise _Violation(f"asks for {count} pages of {region.num_pages}")
            return
        else:
            self.pages = struct.unpack_from(f"<{wanted // 4 - 1}I", self._asked, 4)
            if max(self.pages) >= region.num_pages:
                raise _Violation(f"asks for page {max(self.pages)} of {region.num_pages}")
        self._asked.clear()

    def answer(self) -> None:
        """Send on. Raises OSError if the connection is lost."""
        window, taken = self._window, 0
        assert window is not None
        while self.pages and taken < _MOST_BYTES:
            pages = self.pages[: window.num_pages]
            if not self._loaded:
                window.load(pages)
                self._loaded = True
            count = self.socket.sendmsg(window.views(pages, self._sent))
            taken += count
            self._sent += count
            if self._sent == len(pages) * window.page_bytes:
                self.pages, self._loaded, self._sent = self.pages[len(pages) :], False, 0

    def close(self) -> None:
        self.socket.close()
        if self._window is not None:
            self._window.close()


class PageServer:
    """Listens from construction on until `close`. `failure` is set if its thread has died, of a bug."""

    def __init__(self, host: str, port: int, key: bytes, region: MemoryRegion) -> None:
        """Raises OSError if the address cannot be listened on."""
        self.failure: Exception | None = None
        self._key = key
        self._region = region
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=host == "::")
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._readers: set[_Reader] = set()
        self._strangers: dict[_Reader, None] = {}  # of these, who have not shown the key yet, oldest first
        self._accept_at: float | None = None  # there were no descriptors: then once more
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="page-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and all connections."""
        self._waker.close()
        self._thread.join()

    # ------------------------------------------------------------ in the server's thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as failure:
            logger.exception("pages cannot be read over TCP any more")
            self.failure = failure
        finally:
            for reader in list(self._readers):
                self._drop(reader)
            for opened in (self._selector, self._listener, self._wake):
                opened.close()

    def _turn(self) -> bool:
        """Wait for something to do, and do it; False: the end has come."""
        waits = [_PAUSE_S] * (self._accept_at is not None) + [_KEY_S] * bool(self._strangers)
        for selected, _ in self._selector.select(min(waits, default=None)):
            if selected.fileobj is self._wake:
                return False
            if selected.fileobj is self._listener:
                self._accept()
            elif selected.data in self._readers:  # and not dropped a moment ago
                self._serve(selected.data)
        now = time.monotonic()
        if self._accept_at is not None and now >= self._accept_at:
            self._accept_at = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        for reader in [stranger for stranger in self._strangers if now - stranger.since >= _KEY_S]:
            self._drop(reader)
        return True

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                self._accept_at = time.monotonic() + _PAUSE_S
                self._selector.unregister(self._listener)
            return  # else it has left again
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _OPTIONS.items():
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        except OSError:
            connection.close()
            return
        if len(self._readers) >= _MOST_CONNECTIONS:
            self._drop(next(iter(self._strangers or self._readers)))
        reader = _Reader(connection, time.monotonic())
        self._readers.add(reader)
        self._strangers[reader] = None
        self._selector.register(connection, selectors.EVENT_READ, reader)

    def _serve(self, reader: _Reader) -> None:
        before = reader.events
        try:
            if reader.pages:
                reader.answer()
            else:
                reader.hear(self._key, self._region)
                if reader.admitted:
                    self._strangers.pop(reader, None)
        except BlockingIOError:
            pass
        except OSError:  # gone; its worker's lease says what that means
            self._drop(reader)
            return
        except _Violation as violation:
            logger.warning("a reader over TCP is turned away: %s", violation)
            self._drop(reader)
            return
        except Exception:  # the device's, or a bug: others are served
            logger.exception("a reader over TCP cannot be served")
            self._drop(reader)
            return
        if reader.events != before:
            self._selector.modify(reader.socket, reader.events, reader)

    def _drop(self, reader: _Reader) -> None:
        self._readers.discard(reader)
        self._strangers.pop(reader, None)
        self._selector.unregister(reader.socket)
        reader.close()
