"""A `PageWindow` on a pool of a GPU: pages pass through pinned host memory. Needs torch with CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import TransportError
from penstock.kv_transfer.page_window import PageWindow


class StagedWindow(PageWindow):
    """Waits for its copies: a network is far slower than the way to the host."""

    staged = True

    def __init__(self, region: MemoryRegion, num_pages: int) -> None:
        """Raises TransportError without such a device, or without pinned memory."""
        super().__init__(region.page_bytes, num_pages)
        device = torch.device(region.device)
        if (device.index or 0) >= torch.cuda.device_count():
            raise TransportError(f"there is no {region.device} here")
        self._stream = _stream(device)
        self._pool = _bytes_at(region, device)
        try:
            self._staged = torch.empty((num_pages, region.page_bytes), dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise TransportError(f"no pinned memory for pages of {region.device}: {error}") from error
        self._memory = self._staged.view(-1).numpy().data

    def views(self, pages: Sequence[int], skip: int) -> list[memoryview]:
        return [self._memory[skip : len(pages) * self.page_bytes]]

    def load(self, pages: Sequence[int]) -> None:
        self._copy(pages, to_device=False)

    def store(self, pages: Sequence[int]) -> None:
        self._copy(pages, to_device=True)

    def close(self) -> None:
        self._memory.release()

    def _copy(self, pages: Sequence[int], *, to_device: bool) -> None:
        with torch.cuda.stream(self._stream):
            for i, page in enumerate(pages):
                ours, theirs = self._staged[i], self._pool[page]
                (theirs if to_device else ours).copy_(ours if to_device else theirs, non_blocking=True)
        self._stream.synchronize()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all windows: torch has 32 of a kind a device and gives them out in turn, those of the engine's, too. Of
    high priority, so that copies do not stand behind steps that were submitted before."""
    return torch.cuda.Stream(device, priority=-1)


class _Interface:
    """An address of a device as torch takes it (the CUDA array interface of Numba)."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (address, False), "shape": shape, "typestr": "|u1", "strides": None, "version": 3,
        }  # fmt: skip


def _bytes_at(region: MemoryRegion, device: torch.device) -> Tensor:
    """uint8 [num_pages, page_bytes]: the region's own memory."""
    shape = (region.num_pages, region.page_bytes)
    return torch.as_tensor(_Interface(region.address, shape), device=device)
