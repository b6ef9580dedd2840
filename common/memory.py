"""A plain description of memory that holds KV pages: what the engine's pool offers and a transport registers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryRegion:
    """`num_pages` pages of `page_bytes` each, back to back from `address`.

    `fd` is the memfd behind CPU memory (so that a process on this host can map it), or -1.
    `device` is "cpu" or "cuda:N".
    """

    address: int
    page_bytes: int
    num_pages: int
    device: str = "cpu"
    fd: int = -1

    @property
    def size_bytes(self) -> int:
        return self.page_bytes * self.num_pages
