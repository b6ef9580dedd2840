"""Page checksums: published values, every byte and its place count, and all forms of the GPU's agree."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from penstock.kernels.page_checksum import checksum_name, page_checksums, word_sums, word_sums_triton
from tests.kernels.variants import variants

Checksums = Callable[[Tensor, Sequence[int]], list[int]]
FORMS = variants(word_sums, word_sums_triton)


def on_device(function: Checksums, device: str) -> Checksums:
    """The GPU's own form: what a pool there is asked for."""
    return page_checksums if device == "cuda" else function


def random_pages(num_pages: int, page_bytes: int, device: str) -> Tensor:
    pages = torch.randint(
        0, 256, (num_pages, page_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return pages.to(device)


def by_definition(page: bytes) -> int:
    """The sum as its formula says, word by word, in Python's integers."""
    words = [int.from_bytes(page[i : i + 8], "little") for i in range(0, len(page), 8)]
    return sum(splitmix64(word + i * 0x9E3779B97F4A7C15) for i, word in enumerate(words)) % 2**64


def splitmix64(state: int) -> int:
    """One step of the generator: advance the state, mix it."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_published_value_of_nothing_and_of_zeros() -> None:
    # XXH3_64bits of the empty input with seed 0, from the xxHash specification.
    assert page_checksums(torch.zeros(2, 0, dtype=torch.uint8), [1]) == [0x2D06800538D394C2]
    assert checksum_name(torch.device("cpu")) == "xxh3-64"
    assert checksum_name(torch.device("cuda", 1)) == "splitmix64-sum"


def test_published_values_of_splitmix64() -> None:
    # The first outputs of SplitMix64 from the state 1234567: Rosetta Code's and Java's SplittableRandom's.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix64(1234567 + i * 0x9E3779B97F4A7C15) for i in range(5)] == expected


@pytest.mark.parametrize("page_bytes", [8, 48, 16384, 16384 + 8, 40960])
@pytest.mark.parametrize(("function", "device"), FORMS)
def test_word_sums_are_the_formula(function: Checksums, device: str, page_bytes: int) -> None:
    pages = random_pages(5, page_bytes, device)
    expected = [by_definition(page.numpy().tobytes()) for page in pages.cpu()]
    listed = [3, 0, 3, 4]
    assert on_device(function, device)(pages, listed) == [expected[page] for page in listed]
    assert on_device(function, device)(pages, []) == []


@pytest.mark.parametrize("page_bytes", [1, 17, 240, 241, 4099])
def test_every_byte_counts_and_only_in_its_page(page_bytes: int) -> None:
    pages = random_pages(5, page_bytes, "cpu")
    before = page_checksums(pages, range(5))
    assert page_checksums(pages, [3, 0, 3]) == [before[3], before[0], before[3]]
    for byte in {0, page_bytes // 2, page_bytes - 1}:
        pages[2, byte] ^= 1
        changed = page_checksums(pages, range(5))
        assert [old == new for old, new in zip(before, changed, strict=True)] == [True, True, False, True, True]
        pages[2, byte] ^= 1


@pytest.mark.parametrize(("function", "device"), FORMS)
def test_any_bit_and_any_exchange_of_words_changes_a_word_sum(function: Checksums, device: str) -> None:
    """Of words that are nearly alike, too: the exponents of neighbouring values are, and pages of zeros."""
    sums = on_device(function, device)
    pick = random.Random(1)
    pages = torch.zeros(64, 20480, dtype=torch.uint8)
    pages[:, ::7] = 0x3F
    for row in range(1, 32):  # row 0 with one bit flipped
        pages[row, pick.randrange(20480)] ^= 1 << pick.randrange(8)
    words = pages.view(torch.int64)
    words[32:, 5] += 1
    for row in range(33, 64):  # row 32 with its odd word moved
        words[row, [5, 5 + 7 * row]] = words[row, [5 + 7 * row, 5]]
    found = sums(pages.to(device), range(64))
    assert len({tuple(row) for row in pages.tolist()}) == len(set(found)) > 60


@pytest.mark.parametrize(("function", "device"), FORMS)
def test_rows_may_be_part_of_wider_memory(function: Checksums, device: str) -> None:
    wide = random_pages(4, 128, device)
    assert on_device(function, device)(wide[:, 16:80], [2]) == on_device(function, device)(wide[:, 16:80].clone(), [2])
    assert page_checksums(wide.cpu()[:, 20:84], [2]) == page_checksums(wide.cpu()[:, 20:84].clone(), [2])


def test_pages_that_are_not_words_are_refused() -> None:
    with pytest.raises(ValueError, match="not made of 64-bit words"):
        word_sums_triton(torch.zeros(2, 12, dtype=torch.uint8), [0])
