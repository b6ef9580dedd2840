"""Two hosts on one machine: network namespaces, a veth pair each, and a bridge whose link between them can fail.

The test stands on the bridge itself: it reaches both hosts whatever becomes of the link between them, unless that is
unplugged. Needs root and Debian's `iproute2` (.ci/run sees to it). A process gets to a host by `ip netns exec`, or by a
fork that does the same (forking.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


def _possible() -> bool:
    """Root in a container may have no right to all that the hosts need."""
    probe = ("unshare", "--net", "--mount", "mount", "-t", "sysfs", "sysfs", "/sys")
    return (
        all(map(shutil.which, ("ip", "unshare"))) and subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0
    )


needs_namespaces = pytest.mark.skipif(
    not os.environ.get("TEST_NAMESPACES") and not _possible(),
    reason="needs iproute2 and the right to make network namespaces; TEST_NAMESPACES=1 makes their absence a failure",
)


@dataclass(frozen=True)
class Host:
    """One of the two. `inside` goes before a command that is to run there; `port` is its plug at the bridge."""

    name: str
    address: str
    port: str

    @property
    def inside(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)


@dataclass(frozen=True)
class TwoHosts:
    """Both hosts, and what can happen to the link between them."""

    one: Host
    other: Host

    def unplug(self) -> None:
        """`one` is off the network: its link is down."""
        _run("ip", "link", "set", self.one.port, "down")

    def silence(self) -> None:
        """The link swallows every packet between the two; nobody is told."""
        self._isolate("on")

    def slow_down(self, kbit_s: int) -> None:
        """`one` sends at this rate."""
        # On its own side: what leaves the bridge towards it stays fast.
        shaped = ("dev", "eth0", "root", "tbf", "rate", f"{kbit_s}kbit", "burst", "16kb", "latency", "500ms")
        _run(*self.one.inside, "tc", "qdisc", "replace", *shaped)

    def restore(self) -> None:
        """As at the start."""
        _run("ip", "link", "set", self.one.port, "up")
        self._isolate("off")
        subprocess.run(
            (*self.one.inside, "tc", "qdisc", "del", "dev", "eth0", "root"), capture_output=True, check=False
        )

    def _isolate(self, isolated: str) -> None:
        for host in (self.one, self.other):
            _run("bridge", "link", "set", "dev", host.port, "isolated", isolated)


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Make them; nothing of them is left when the block ends, once the processes in them have."""
    number = os.getpid()
    network = f"10.{64 + number // 250 % 64}.{number % 250}"
    bridge = f"pk{number}"
    hosts = [Host(f"penstock-{number}-{n}", f"{network}.{n}", f"pk{number}p{n}") for n in (1, 2)]
    with contextlib.ExitStack() as stack:
        _run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(_run, "ip", "link", "del", bridge)
        _run("ip", "address", "add", f"{network}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for host in hosts:
            _run("ip", "netns", "add", host.name)
            stack.callback(_run, "ip", "netns", "del", host.name)
            _run("ip", "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            stack.callback(_run, "ip", "link", "del", host.port)
            _run("ip", "link", "set", host.port, "master", bridge, "up")
            _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", host.name, "link", "set", device, "up")
        yield TwoHosts(*hosts)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
