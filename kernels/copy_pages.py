"""Copying a list of scattered pages from one pool into another, in one launch: what moves pages between GPUs.

Called by kv_transfer/cuda_ipc.py with the address where a peer's pool is mapped: what is launched takes addresses.
A program moves one piece of one page: a list's time depends on its bytes, not on how they are cut into pages. Reads
over NVLink take microseconds: at 400 GB/s about a megabyte must be on its way. A program has 16 KiB, eight reads of 16
bytes a thread, all issued before the first is stored, and several programs share a multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import use_triton

ALIGNMENT = 16  # of addresses and of page_bytes: the widest access of a thread
_WORDS = 2048  # of 8 bytes in a program's piece


def copy_pages(src: Tensor, dst: Tensor, pages: Tensor) -> None:
    """dst[pages[1, i]] = src[pages[0, i]] for all i.

    src: uint8 [N, page_bytes], dst: uint8 [M, page_bytes], both contiguous; pages: int32 [2, n], no destination twice.
    """
    if use_triton(dst):
        copy_pages_at(src.data_ptr(), dst.data_ptr(), src.shape[1], pages)
    else:
        dst[pages[1].long()] = src[pages[0].long()]


def copy_pages_at(src_address: int, dst_address: int, page_bytes: int, pages: Tensor) -> None:
    """`copy_pages` between pools that begin at these addresses; pages: int32 [2, n] on the device that copies.

    Raises:
        ValueError: addresses or page_bytes are not multiples of 16.
    """
    if src_address % ALIGNMENT or dst_address % ALIGNMENT or page_bytes % ALIGNMENT:
        raise ValueError(f"pages of {page_bytes} bytes cannot be copied in pieces of {ALIGNMENT}")
    assert pages.dtype is torch.int32 and pages.is_contiguous()
    count, page_words = pages.shape[1], page_bytes // 8
    if count == 0:
        return
    grid = (count * triton.cdiv(page_words, _WORDS),)
    whole = page_words % _WORDS == 0
    _copy_kernel[grid](src_address, dst_address, pages, count, page_words, WORDS=_WORDS, WHOLE=whole, num_warps=4)


@triton.jit
def _copy_kernel(
    src_address, dst_address, pages, count, page_words, WORDS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """`WHOLE`: a page is a whole number of pieces. The hint says what ALIGNMENT promises: 16-byte accesses."""
    pieces = tl.cdiv(page_words, WORDS)
    entry = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    src_page = tl.load(pages + entry).to(tl.int64)
    dst_page = tl.load(pages + count + entry).to(tl.int64)
    offsets = piece * WORDS + tl.arange(0, WORDS)
    src = src_address.to(tl.pointer_type(tl.int64)) + src_page * page_words + offsets
    dst = dst_address.to(tl.pointer_type(tl.int64)) + dst_page * page_words + offsets
    src = tl.multiple_of(src, 16)
    dst = tl.multiple_of(dst, 16)
    if WHOLE:
        tl.store(dst, tl.load(src))
    else:
        inside = offsets < page_words
        tl.store(dst, tl.load(src, mask=inside), mask=inside)
