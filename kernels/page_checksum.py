"""Checksums of KV pages, compared on both sides of a transfer. This is the plain reference for every device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from xxhash import xxh3_64_intdigest


def page_checksums(pages: Tensor, page_ids: Sequence[int]) -> list[int]:
    """XXH3-64 of each page's bytes; pages: uint8 [num_pages, page_bytes], each row contiguous.

    On CPU the bytes are read where they are, and xxhash lets go of the interpreter lock meanwhile. Pages of another
    device are copied to the host first.
    """
    if not pages.is_cpu:
        pages, page_ids = pages[list(page_ids)].cpu(), range(len(page_ids))
    rows = pages.numpy()
    return [xxh3_64_intdigest(rows[page]) for page in page_ids]
