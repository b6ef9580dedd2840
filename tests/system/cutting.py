"""`penstock` whose bus runs through a relay: SIGUSR1 resets all its connections, while both ends live on."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import threading
from typing import Any

from penstock.cli import main
from penstock.common.bus import BusServer

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST
_init = BusServer.__init__


class _Relay:
    """A TCP relay on a port of its own; two threads a connection."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._sockets: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                one.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it, which closes it
        print(f"cut {len(sockets) // 2} connections", flush=True)

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            try:
                far = socket.create_connection(self._target)
            except OSError:  # the bus has closed: the process is leaving
                near.close()
                continue
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
    source.close()


def _init_behind_relay(self: BusServer, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    host, _, port = self.address.removeprefix("tcp://").rpartition(":")
    relay = _Relay((host, int(port)))
    signal.signal(signal.SIGUSR1, lambda signum, frame: relay.cut())
    self.address = relay.address


def cut_on_signal() -> None:
    """Put every bus of this process behind a relay."""
    BusServer.__init__ = _init_behind_relay  # type: ignore[method-assign]


if __name__ == "__main__":
    cut_on_signal()
    raise SystemExit(main())
