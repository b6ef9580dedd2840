"""What a worker process announces, and how it ends: everything is closed, in an order in which nothing waits for what
may not come."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest

from penstock.common.bus import BusServer
from penstock.engine.worker_process import _take_down, status_url


class Parts:
    """What is taken down, and in which order that was; `clean`: no copy is in flight."""

    def __init__(self, clean: bool) -> None:
        self.closed: list[str] = []
        self._clean = clean

    def take_down(self) -> None:
        built: Any = SimpleNamespace(engine=self._part("engine"))
        _take_down(built, self._part("bus"), self._part("loop"), self._part("role"))

    def _part(self, name: str) -> Any:
        def close() -> bool:
            self.closed.append(name)
            return self._clean

        return SimpleNamespace(close=close)


def test_the_loop_ends_before_the_engine() -> None:
    parts = Parts(clean=True)
    parts.take_down()
    assert parts.closed == ["role", "bus", "loop", "engine"]


@pytest.mark.parametrize("failed", [False, True])
def test_with_a_copy_in_flight_neither_steps_nor_the_mover_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    def leave(status: int) -> NoReturn:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    parts = Parts(clean=False)
    with pytest.raises(SystemExit) as left:
        try:
            if failed:
                raise RuntimeError("a step failed")
        finally:
            parts.take_down()
    assert (left.value.code, parts.closed) == (int(failed), ["role", "bus"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_the_status_pages_are_announced_where_the_bus_is(host: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("no IPv6 here")
    bus = BusServer(host, 0, "")
    url = urlsplit(status_url(bus.address, 8080))
    bus.close()
    assert (url.scheme, url.hostname, url.port) == ("http", host, 8080)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
