"""Checksums of KV pages, compared on both sides of a transfer; each device has the function that is fast on it.

On CPU XXH3-64, from the xxhash package: 20 GB/s on one core (Zen 4), without the interpreter lock. On a GPU, where its
wide state does not map onto threads, a sum of mixed words, computed where the pages lie:

    sum over i of mix(word[i] + (i + 1) * GAMMA)  mod 2^64

over the page's little-endian 64-bit words, with mix and GAMMA of SplitMix64 (Steele, Lea, Flood 2014; variant 13 of
Stafford's mixers). mix is a bijection: damage within one word is always seen. Words that are exchanged or moved give
other terms. Other damage passes with probability 2^-64, as far as mix behaves as a random function: this is against
faults, not against forgers. On CPU numpy needs nine passes for it, 0.8 GB/s: so the two names differ, and with them the
fingerprints of workers that cannot compare.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from xxhash import xxh3_64_intdigest

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORDS = 2048  # a program sums up so many: 16 KiB
_LEAST_PAGES = 1024  # that pinned memory has room for
_MASK = (1 << 64) - 1


def checksum_name(device: torch.device) -> str:
    """The function that `page_checksums` computes there: peers that compare must have the same."""
    return "splitmix64-sum" if device.type == "cuda" else "xxh3-64"


def page_checksums(pages: Tensor, page_ids: Sequence[int]) -> list[int]:
    """A checksum of each page's bytes, in the order of page_ids; pages: uint8 [num_pages, page_bytes], rows contiguous.

    Nothing may write these pages meanwhile, and what wrote them must have ended: on a GPU they are read on a stream of
    their own, which the calling thread waits for. The interpreter lock is free while bytes are read.
    """
    if pages.is_cuda:
        return word_sums_triton(pages, page_ids)
    rows = pages.numpy()
    return [xxh3_64_intdigest(rows[page]) for page in page_ids]


def word_sums(pages: Tensor, page_ids: Sequence[int]) -> list[int]:
    """The plain form of what a GPU computes; page_bytes is a multiple of 8."""
    words = pages.cpu().numpy()[list(page_ids)].view("<u8")  # [page, word]
    mixed = words + np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(multiplier)
    mixed ^= mixed >> np.uint64(31)
    return [int(total) for total in mixed.sum(axis=1, dtype=np.uint64)]


def word_sums_triton(pages: Tensor, page_ids: Sequence[int]) -> list[int]:
    """`word_sums` where the pages are.

    Raises:
        ValueError: a page is not a whole number of words.
    """
    if pages.shape[1] % 8 or pages.stride(0) % 8 or pages.stride(1) != 1:
        raise ValueError(f"pages of {pages.shape[1]} bytes are not made of 64-bit words")
    if not page_ids:
        return []
    if not pages.is_cuda:
        return [int(total) & _MASK for total in _launch(pages, torch.tensor(page_ids, dtype=torch.int32)).tolist()]
    count, stream = len(page_ids), _stream(pages.device)
    ids, found = _pinned(count)
    ids.numpy()[:] = page_ids
    with torch.cuda.device(pages.device), torch.cuda.stream(stream):
        try:
            found.copy_(_launch(pages, ids.to(pages.device, non_blocking=True)), non_blocking=True)
        finally:
            stream.synchronize()  # the next list goes where this one is read from
    return [int(total) & _MASK for total in found.tolist()]


def _launch(pages: Tensor, page_ids: Tensor) -> Tensor:
    """int64 [n]; page_ids: int32 [n] on the pages' device. A piece of a page has a program and a sum of its own."""
    words = pages.shape[1] // 8
    pieces = triton.cdiv(words, _WORDS)
    partial = torch.empty(len(page_ids), pieces, dtype=torch.int64, device=pages.device)
    if words:
        grid = (len(page_ids) * pieces,)
        _sum_kernel[grid](pages.view(torch.int64), page_ids, partial, words, pages.stride(0) // 8, WORDS=_WORDS)
    return partial.sum(dim=1)


def _pinned(count: int) -> tuple[Tensor, Tensor]:
    """int32 [count] and int64 [count] in this thread's pinned memory: getting new takes as long as the checksums."""
    kept: tuple[Tensor, Tensor] | None = getattr(_threads, "pinned", None)
    if kept is None or len(kept[0]) < count:
        size = max(_LEAST_PAGES, count)
        kept = _threads.pinned = tuple(torch.empty(size, dtype=t, pin_memory=True) for t in (torch.int32, torch.int64))
    return kept[0][:count], kept[1][:count]


_threads = threading.local()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of its own, and of high priority, or a checksum would wait for a step that was submitted before it: of
    streams alike, more than the device has queues for, some share one; and a kernel that fills the device goes first.
    """
    return torch.cuda.Stream(device, priority=-1)


@triton.jit
def _sum_kernel(pages, page_ids, partial, words, stride, WORDS: tl.constexpr):
    pieces = tl.cdiv(words, WORDS)
    entry = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    page = tl.load(page_ids + entry).to(tl.int64)
    offsets = piece * WORDS + tl.arange(0, WORDS)
    inside = offsets < words
    word = tl.load(pages + page * stride + offsets, mask=inside, other=0).to(tl.uint64, bitcast=True)
    x = word + (offsets + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = (x ^ (x >> 31)).to(tl.int64, bitcast=True)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(inside, x, 0), axis=0))
