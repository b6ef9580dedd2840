"""Who may use the bus, and where it may listen. Used by `bus.py` only.

Loopback is open to this host. Anywhere else the bus is encrypted with CURVE, under keys that everyone who knows the
fleet's cluster key derives for himself, and a client without them is turned away.
"""

from __future__ import annotations

import ipaddress
import socket as net
from hashlib import blake2b

import zmq
from zmq.utils import z85

from penstock.common.errors import ConfigError


def curve_keys(cluster_key: str) -> tuple[bytes, bytes]:
    """(public, secret) CURVE keys of a fleet, Z85: everyone who knows the cluster key derives the same pair."""
    secret = z85.encode(blake2b(cluster_key.encode(), digest_size=32, person=b"penstock-bus").digest())
    return zmq.curve_public(secret), secret


class ClusterMembers:
    """Tells ZAP (pyzmq's authenticator) which client keys may come in: the fleet's own."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        """True lets the client in."""
        return key == self._public


def resolve_bind(host: str, cluster_key: str) -> tuple[str, str]:
    """(address to bind, host to announce), both ready for a tcp:// URL.

    Raises:
        ConfigError: the name has no address, is not loopback while there is no key, or announces nothing reachable.
    """
    address = _address_of(host)
    if not address.is_loopback and not cluster_key:
        raise ConfigError(f"bus_host {host!r} is not loopback: set cluster_key, it encrypts the bus")
    announced = host
    if address.is_unspecified:
        own = _address_of(net.gethostname())
        if own.is_loopback:
            raise ConfigError(f"bus_host {host!r}: this host's own name is loopback; give the address that peers reach")
        announced = str(own)
    bind = f"[{address}]" if address.version == 6 else str(address)
    return bind, f"[{announced}]" if ":" in announced else announced


def _address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(net.getaddrinfo(host, None, type=net.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"bus_host {host!r} cannot be resolved: {error}") from error
