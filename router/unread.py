"""Clients that take nothing of what is written for them. `Unread` finds them, pure; server.py closes their connections.

An answer that nobody reads waits in its connection's buffer, whole if it has ended, for as long as the connection
lives, and TCP keeps up one whose other end is alive and does not read.
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


class Unread(Generic[_T]):
    """What waits at each connection, and since when neither less nor more does.

    A client that reads slowly makes it less; an answer that is still being written makes it more, which ends where the
    buffer is full.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._waiting: dict[_T, tuple[int, float]] = {}  # bytes, and the time at which they became so many

    def look(self, waiting: Mapping[_T, int], now: float) -> list[_T]:
        """Connections whose clients have taken nothing for the time limit. `waiting`: bytes, where there are any."""
        before = self._waiting
        self._waiting = {
            connection: known if (known := before.get(connection)) and known[0] == size else (size, now)
            for connection, size in waiting.items()
        }
        return [connection for connection, (_, since) in self._waiting.items() if now - since >= self._limit_s]


def waiting_bytes(transport: asyncio.Transport) -> int:
    """What was written and not taken: 0 if all has left this process, else with what the kernel still holds."""
    size = transport.get_write_buffer_size()
    if size:  # the kernel takes more only when a good part of its own is gone, so a slow reader shows there
        with contextlib.suppress(OSError, ValueError):  # it is being closed
            held = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            size += int(struct.unpack("i", held)[0])
    return size


def cut(transport: asyncio.Transport) -> None:
    """Close a connection, and forget what waits for it, in the kernel, too."""
    with contextlib.suppress(OSError, ValueError):  # it is being closed
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()
