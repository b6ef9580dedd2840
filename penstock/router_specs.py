"""How to run a fleet's router processes: one, or several that share its port. Used by fleet.py and launcher.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from http.client import HTTPConnection, HTTPException

from penstock.child_process import ProcessSpec
from penstock.common.config import RouterConfig
from penstock.common.errors import ConfigError
from penstock.own_process import own_process
from penstock.private_redis import free_port, port_is_free
from penstock.supervisor import Member

HEALTH_TIMEOUT_S = 1.0
SHUTDOWN_GRACE_S = 10.0  # beyond drain_s, before a process that does not end is killed
_ADMIN_HOST = "127.0.0.1"
_ANY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # asyncio's "::" takes no IPv4


def router_specs(config: RouterConfig, workers: Mapping[str, int]) -> list[ProcessSpec]:
    """`router`, or `router-0`, `router-1`, ...; one is ready when it is linked to so many workers of each role.

    Raises:
        ConfigError: an admin port is in use.
    """
    if config.router_procs == 1:
        return [_spec("router", config, reachable_host(config.host), config.port, workers)]
    ports = _admin_ports(config)
    texts = tuple(map(str, ports))
    return [
        _spec(f"router-{i}", replace(config, router_procs=1, admin_port=p, group_ports=texts), _ADMIN_HOST, p, workers)
        for i, p in enumerate(ports)
    ]


def reachable_host(host: str) -> str:
    """An address of this machine at which a server that listens on `host` answers."""
    return _ANY_ADDRESS.get(host, host)


def reachable_address(host: str, port: int) -> str:
    """That address and a port, as they stand in a URL."""
    found = reachable_host(host)
    return f"[{found}]:{port}" if ":" in found else f"{found}:{port}"


def _admin_ports(config: RouterConfig) -> list[int]:
    if not config.admin_port:
        ports: set[int] = set()
        while len(ports) < config.router_procs:
            ports.add(free_port(_ADMIN_HOST))
        return sorted(ports)
    wanted = list(range(config.admin_port, config.admin_port + config.router_procs))
    for port in wanted:
        if not port_is_free(_ADMIN_HOST, port):
            raise ConfigError(f"cannot listen on {_ADMIN_HOST} port {port}, an admin port: it is in use")
    return wanted


def _spec(name: str, config: RouterConfig, host: str, port: int, workers: Mapping[str, int]) -> ProcessSpec:
    member = Member(name, tier=2, drain_s=config.drain_s + SHUTDOWN_GRACE_S)
    return own_process(member, "router", config, lambda pid: _serves(host, port, workers))


def _serves(host: str, port: int, workers: Mapping[str, int]) -> bool:
    """Whether the router answers and is linked to that many workers of each role."""
    connection = HTTPConnection(host, port, timeout=HEALTH_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        linked = json.load(answer)["workers"] if answer.status == 200 else {}
        return all(linked.get(role, 0) >= count for role, count in workers.items())
    except (OSError, HTTPException):
        return False
    except (ValueError, KeyError, TypeError, AttributeError):  # somebody else answers there
        return False
    finally:
        connection.close()
