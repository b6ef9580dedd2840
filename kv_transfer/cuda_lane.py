"""A stream of the reader's device that page copies are launched on. Needs torch with CUDA; used by cuda_ipc.py only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.copy_pages import copy_pages_at
from penstock.kv_transfer.base import TransportError

_LEAST_PAGES = 1024  # that lists have room for


class _PageLists:
    """Where the two page lists of one copy are written, and where its kernel reads them; used again by later copies."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.event = torch.cuda.Event()
        self._pinned = torch.empty(2 * capacity, dtype=torch.int32, pin_memory=True)
        self._written = self._pinned.numpy()
        self._on_device = torch.empty(2 * capacity, dtype=torch.int32, device=device)

    def send(self, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Tensor:
        """int32 [2, n] on the device, in the order of the current stream, which is not waited for."""
        count = len(src_pages)
        self._written[:count] = src_pages
        self._written[count : 2 * count] = dst_pages
        return self._on_device[: 2 * count].copy_(self._pinned[: 2 * count], non_blocking=True).view(2, count)


class Launched:
    """A copy on its way."""

    def __init__(self, lists: _PageLists, unused: list[_PageLists]) -> None:
        """The lists come to `unused` when the copy has ended; of one that fails they are not used again."""
        self._lists = lists
        self._unused = unused

    def query(self) -> bool:
        """Whether it has ended; not to be asked again then. Raises RuntimeError if the device has failed."""
        if not self._lists.event.query():
            return False
        self._unused.append(self._lists)
        return True


class CudaLane:
    """The stream. Calls may come from any one thread.

    A stream of high priority: its launches neither stand behind steps that were submitted before, nor wait until one of
    a step's kernels leaves room.
    """

    def __init__(self, index: int) -> None:
        """Raises TransportError without such a device."""
        if index >= torch.cuda.device_count():
            raise TransportError(f"there is no cuda:{index} here")
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device, priority=-1)
        self._unused: list[_PageLists] = []
        self.device = _uuid(index)

    def check_peer(self, device: str) -> None:
        """A device that is not visible here says nothing: then opening its memory decides."""
        for index in range(torch.cuda.device_count()):
            same = index == self._device.index
            if _uuid(index) == device and not same and not torch.cuda.can_device_access_peer(self._device.index, index):
                raise TransportError(f"{self._device} has no peer access to cuda:{index}")

    def copy(self, src: int, dst: int, page_bytes: int, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Launched:
        """Launch the copy of a list."""
        lists = self._unused.pop() if self._unused else None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if lists is None or lists.capacity < len(src_pages):
                lists = _PageLists(max(_LEAST_PAGES, len(src_pages)), self._device)
            copy_pages_at(src, dst, page_bytes, lists.send(src_pages, dst_pages))
            lists.event.record(self._stream)
        return Launched(lists, self._unused)

    def scratch(self, page_bytes: int) -> Tensor:
        """uint8 [page_bytes], filled before this returns."""
        with torch.cuda.device(self._device):
            page = torch.full((page_bytes,), 255, dtype=torch.uint8, device=self._device)
            torch.cuda.synchronize(self._device)
        return page


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
