"""CPU pages as arrays, and their checksums. Called by the transports and the mover with a pool's `MemoryRegion`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.common.memory import MemoryRegion

PageArray = NDArray[np.uint8]  # [num_pages, page_bytes]


def page_array(region: MemoryRegion) -> PageArray:
    """The region's own bytes, not a copy; valid as long as the memory is mapped. CPU memory only."""
    raw: Any = (ctypes.c_uint8 * region.size_bytes).from_address(region.address)
    return np.frombuffer(raw, np.uint8).reshape(region.num_pages, region.page_bytes)


def checksums(region: MemoryRegion, pages: Sequence[int]) -> list[int]:
    """xxh3-64 of each page's bytes. The interpreter lock is free while a page is hashed."""
    array = page_array(region)
    return [xxhash.xxh3_64_intdigest(array[page]) for page in pages]
