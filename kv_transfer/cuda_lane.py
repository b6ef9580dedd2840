"""A stream of the reader's device that page copies are launched on. Needs torch with CUDA; used by cuda_ipc.py only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.copy_pages import copy_pages_at
from penstock.kv_transfer.base import TransportError


class Launched:
    """A copy on its way: its event, and the page lists that the launch reads."""

    def __init__(self, event: torch.cuda.Event, *kept: Tensor) -> None:
        self._event = event
        self._kept = kept

    def query(self) -> bool:
        """Whether it has ended. Raises RuntimeError if the device has failed."""
        return bool(self._event.query())


class CudaLane:
    """The stream. Calls may come from any one thread."""

    def __init__(self, index: int) -> None:
        """Raises TransportError without such a device."""
        if index >= torch.cuda.device_count():
            raise TransportError(f"there is no cuda:{index} here")
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)
        self.device = _uuid(index)

    def check_peer(self, device: str) -> None:
        """A device that is not visible here says nothing: then opening its memory decides."""
        for index in range(torch.cuda.device_count()):
            same = index == self._device.index
            if _uuid(index) == device and not same and not torch.cuda.can_device_access_peer(self._device.index, index):
                raise TransportError(f"{self._device} has no peer access to cuda:{index}")

    def copy(self, src: int, dst: int, page_bytes: int, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Launched:
        """Launch the copy of a list. The list goes through pinned memory, or its upload would wait for the stream."""
        listed = torch.from_numpy(np.array([src_pages, dst_pages], np.int32)).pin_memory()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            pages = listed.to(self._device, non_blocking=True)
            copy_pages_at(src, dst, page_bytes, pages)
            event = torch.cuda.Event()
            event.record(self._stream)
        return Launched(event, listed, pages)

    def scratch(self, page_bytes: int) -> Tensor:
        """uint8 [page_bytes], filled before this returns."""
        with torch.cuda.device(self._device):
            page = torch.full((page_bytes,), 255, dtype=torch.uint8, device=self._device)
            torch.cuda.synchronize(self._device)
        return page


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
