"""The memory that holds KV pages, and how a page is laid out.

A page is contiguous over all layers, `[page, kv_head, layer, k/v, slot, head_dim]`: a hand-off moves it as one piece,
and a head's whole share is contiguous too, for workers of different tensor-parallel size. Offsets are 64-bit. On CPU
the pool is a memfd mapping: another process on the host can map it, and the kernel frees it when the last one is gone.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from penstock.common.memory import MemoryRegion
from penstock.kernels.page_checksum import page_checksums


@dataclass(frozen=True)
class KVLayout:
    """Shape of one KV group's pages. Peers that exchange pages must agree on all of it."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int  # tokens
    dtype: torch.dtype

    @property
    def page_shape(self) -> tuple[int, ...]:
        return (self.num_kv_heads, self.num_layers, 2, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        return torch.Size(self.page_shape).numel() * self.dtype.itemsize

    def describe(self) -> str:
        """For fingerprints: equal strings, equal bytes."""
        shape = "x".join(map(str, self.page_shape))
        return f"head,layer,kv,slot,dim:{shape}:{str(self.dtype).removeprefix('torch.')}"


class KVPool:
    """`num_pages` pages on one device."""

    def __init__(self, layout: KVLayout, num_pages: int, device: torch.device, name: str = "penstock") -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.device = device
        self._fd = -1
        if device.type == "cpu":
            size_bytes = num_pages * layout.page_bytes
            self._fd = os.memfd_create(name, os.MFD_CLOEXEC)
            os.ftruncate(self._fd, size_bytes)
            raw = torch.frombuffer(mmap.mmap(self._fd, size_bytes), dtype=torch.uint8)
            self.pages = raw.view(layout.dtype).view(num_pages, *layout.page_shape)
        else:
            self.pages = torch.zeros(num_pages, *layout.page_shape, dtype=layout.dtype, device=device)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Per layer the views (k, v), each `[num_pages, num_kv_heads, page_size, head_dim]`, strided."""
        return [(self.pages[:, :, i, 0], self.pages[:, :, i, 1]) for i in range(self.layout.num_layers)]

    def raw(self) -> Tensor:
        """All bytes, `[num_pages, page_bytes]` uint8."""
        return self.pages.view(torch.uint8).view(self.num_pages, self.layout.page_bytes)

    def region(self) -> MemoryRegion:
        """What a transport registers."""
        return MemoryRegion(
            address=self.pages.data_ptr(),
            page_bytes=self.layout.page_bytes,
            num_pages=self.num_pages,
            device=str(self.device),
            fd=self._fd,
        )

    def checksum(self) -> Callable[[Sequence[int]], list[int]]:
        """Computes the checksum of each of these pages; may be called in any thread."""
        return partial(page_checksums, self.raw())

    def close(self) -> None:
        """Close the file; the mapping itself lives as long as views of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
