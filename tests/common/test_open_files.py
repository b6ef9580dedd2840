"""What happens where sockets or descriptors run out: a link waits for better times, and nothing ends the process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from penstock.common.bus import BusLink, BusServer, Connected, Disconnected, LinkItem, Peers, link_context
from penstock.common.messages import Hello
from penstock.common.open_files import raise_open_files_limit
from tests.worker_info import worker_info

LIMIT_S = 60.0
# With every descriptor taken: a link that has to be opened, and one whose worker ends; the first comes back afterwards.
SQUEEZED = """
import os, resource, time
from penstock.common.bus import BusLink, BusServer, Disconnected, link_context

held = []
def until_lost(link):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            while True:  # whatever is closed meanwhile is taken, too
                held.append(os.dup(0))
        except OSError:
            pass
        if lost := [item for item in link.receive(time.monotonic()) if isinstance(item, Disconnected)]:
            return lost[0]

staying, ending, context = BusServer("127.0.0.1", 0, ""), BusServer("127.0.0.1", 0, ""), link_context()
new, old = [BusLink(one.address, "r", "router", 1, "", "", context) for one in (staying, ending)]
old.receive(time.monotonic())
assert ending.socket.poll(60_000), "it is connected"
most = len(os.listdir("/proc/self/fd")) + 20
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
print(until_lost(new).reason)
ending.close()
print(until_lost(old).reason)
for one in held:
    os.close(one)
deadline = time.monotonic() + 60
while not (hello := staying.receive()) and time.monotonic() < deadline:
    new.receive(time.monotonic())
    time.sleep(0.005)
print("connected" if hello else "not connected")
for one in (new, old, staying):
    one.close()
context.term()
"""


def test_the_limit_is_raised_as_far_as_it_goes() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
        assert raise_open_files_limit() == before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
        assert raise_open_files_limit() == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_limit_that_cannot_be_raised_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_open_files_limit() == 1024
    assert "at most 1024 files" in caplog.text


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    one = link_context()
    one.set(zmq.MAX_SOCKETS, 3)  # of one link
    yield one
    one.term()


@pytest.mark.parametrize("free", [0, 1, 2])
def test_a_link_for_which_there_is_no_socket_is_opened_when_there_is(context: zmq.Context[Any], free: int) -> None:
    """Whichever of its three it does not get."""
    server, peers, poller = BusServer("127.0.0.1", 0, ""), Peers(worker_info(), 10.0), zmq.Poller()
    others = [context.socket(zmq.PAIR) for _ in range(3 - free)]
    link = BusLink(server.address, "r", "router", 1, "", "", context, poller=poller)
    assert link.receive(0.0) == [Disconnected(1, "cannot connect: Too many open files", greeted=False)]
    assert not poller.sockets and not link.connected
    for one in others:
        one.close(0)
    items: list[LinkItem] = []
    deadline = time.monotonic() + LIMIT_S
    while not any(isinstance(item, Connected) for item in items) and time.monotonic() < deadline:
        items += link.receive(time.monotonic())
        for identity, message in server.receive():
            if isinstance(message, Hello):
                server.send(identity, peers.hello(identity, message, 0.0)[0])
        poller.poll(5)
    assert link.connected
    link.close()
    server.close()


def test_there_are_sockets_for_more_links_than_a_context_has_by_itself() -> None:
    context = link_context()
    assert context.get(zmq.MAX_SOCKETS) > 3 * 10_000
    context.term()


def test_without_descriptors_nothing_aborts_and_links_come_back() -> None:
    child = subprocess.run([sys.executable, "-c", SQUEEZED], capture_output=True, text=True, timeout=LIMIT_S)
    assert child.stdout.splitlines() == [
        "cannot connect: Too many open files",
        "connection cut (DISCONNECTED)",
        "connected",
    ], child.stderr
    assert child.returncode == os.EX_OK
