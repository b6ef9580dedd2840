"""Connections at which nothing moves because of their clients. `Stalled` finds them, pure; server.py ends them.

An answer that nobody reads waits in its connection's buffer, whole if it has ended, for as long as the connection
lives, and TCP keeps up one whose other end is alive and does not read. Nor does it end one on which the rest of a
request never comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)
LOOKS = 10  # in the time that a connection may stand still


class Stalled(Generic[_T]):
    """A number of bytes at each connection, and since when it has been the same.

    Of an answer, those that wait to be taken: a client that reads slowly makes it less, what is still being written
    makes it more, which ends where the buffer is full. Of a request, those that have come.
    """

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: 0 for none."""
        self._limit_s, self._next_look = limit_s, 0.0
        self._sizes: dict[_T, tuple[int, float]] = {}  # bytes, and the time at which they became so many

    def due(self, now: float) -> bool:
        """Whether it is time for the next look."""
        if not self._limit_s or now < self._next_look:
            return False
        self._next_look = now + self._limit_s / LOOKS
        return True

    def look(self, sizes: Mapping[_T, int], now: float) -> list[_T]:
        """Those of `sizes` that have been the same, look after look, for the time limit."""
        before = self._sizes
        self._sizes = {
            connection: known if (known := before.get(connection)) and known[0] == size else (size, now)
            for connection, size in sizes.items()
        }
        return [connection for connection, (_, since) in self._sizes.items() if now - since >= self._limit_s]


def waiting_bytes(transport: asyncio.Transport) -> int:
    """What was written and not taken: 0 if all has left this process, else with what the kernel still holds."""
    size = transport.get_write_buffer_size()
    # The kernel takes more only when a good part of its own is gone, so a slow reader shows there.
    return size + _in_kernel(transport, termios.TIOCOUTQ) if size else 0


def unread_bytes(transport: asyncio.Transport) -> int:
    """What has come and waits in the kernel: a process that stood still blames no client for it."""
    return _in_kernel(transport, termios.FIONREAD)


def _in_kernel(transport: asyncio.Transport, queue: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # it is being closed
        held = fcntl.ioctl(transport.get_extra_info("socket").fileno(), queue, bytes(4))
        return int(struct.unpack("i", held)[0])
    return 0


def cut(transport: asyncio.Transport) -> None:
    """Close a connection, and forget what waits for it, in the kernel, too."""
    with contextlib.suppress(OSError, ValueError):  # it is being closed
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()
