"""Which transports this worker offers, and which one it uses towards a peer. Called by a worker at start-up and Hello."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import Transport


def open_transports(setting: str, region: MemoryRegion, incarnation: str) -> list[Transport]:
    """Transports that work here, tried by reading a page of our own pool; `setting` is "auto", "nixl" or "shm"."""
    raise NotImplementedError


def same_host(peer_transports: Mapping[str, bytes]) -> bool:
    """Whether the peer's memory can be mapped here: same boot of the same machine, same process namespace."""
    raise NotImplementedError


def choose(own: Sequence[str], peer_transports: Mapping[str, bytes], same_host: bool) -> str:
    """Name of the transport to read this peer with; raises TransportError when there is none in common."""
    raise NotImplementedError
