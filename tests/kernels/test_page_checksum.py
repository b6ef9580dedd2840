"""Page checksums: the published values, and that every byte counts."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.page_checksum import page_checksums


def test_published_value_of_nothing_and_of_zeros() -> None:
    # XXH3_64bits of the empty input with seed 0, from the xxHash specification.
    assert page_checksums(torch.zeros(2, 0, dtype=torch.uint8), [1]) == [0x2D06800538D394C2]


@pytest.mark.parametrize("page_bytes", [1, 17, 240, 241, 4099])
def test_every_byte_counts_and_only_in_its_page(page_bytes: int) -> None:
    pages = torch.randint(0, 256, (5, page_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = page_checksums(pages, range(5))
    assert page_checksums(pages, [3, 0, 3]) == [before[3], before[0], before[3]]
    for byte in {0, page_bytes // 2, page_bytes - 1}:
        pages[2, byte] ^= 1
        changed = page_checksums(pages, range(5))
        assert [old == new for old, new in zip(before, changed, strict=True)] == [True, True, False, True, True]
        pages[2, byte] ^= 1


def test_rows_may_be_part_of_wider_memory() -> None:
    wide = torch.randint(0, 256, (4, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert page_checksums(wide[:, 20:84], [2]) == page_checksums(wide[:, 20:84].clone(), [2])
