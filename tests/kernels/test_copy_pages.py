"""Copied pages against a loop over numpy rows; the others stay untouched."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.kernels import copy_pages as module
from penstock.kernels.copy_pages import copy_pages, copy_pages_at
from tests.kernels.variants import variants

Copy = Callable[[Tensor, Tensor, Tensor], None]


def launched(src: Tensor, dst: Tensor, pages: Tensor) -> None:
    copy_pages_at(src.data_ptr(), dst.data_ptr(), src.shape[1], pages)


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("page_bytes", [16, 48, 16384, 16384 + 16, 3 * 16384])
@pytest.mark.parametrize(("copy", "device"), variants(copy_pages, launched))
def test_listed_pages_arrive_and_nothing_else_changes(copy: Copy, device: str, page_bytes: int, count: int) -> None:
    pick = random.Random(page_bytes + count)
    fill = np.random.default_rng(page_bytes)
    src, dst = (fill.integers(0, 256, (pages, page_bytes), dtype=np.uint8) for pages in (9, 12))
    lists = [pick.sample(range(9), count), pick.sample(range(12), count)]
    expected = dst.copy()
    for source, target in zip(*lists, strict=True):
        expected[target] = src[source]
    landed = torch.tensor(dst, device=device)
    copy(torch.tensor(src, device=device), landed, torch.tensor(lists, dtype=torch.int32, device=device))
    assert np.array_equal(landed.cpu().numpy(), expected)


def test_offsets_beyond_32_bits() -> None:
    """Sparse memory: the pages that are touched lie 6 GiB apart."""
    pages = torch.empty(3 << 18, 8192, dtype=torch.uint8)
    far = len(pages) - 1
    pages[3] = torch.arange(8192) % 251
    launched(pages, pages, torch.tensor([[3], [far]], dtype=torch.int32))
    assert torch.equal(pages[far], pages[3])


@pytest.mark.parametrize("wrong", [(8, 0, 64), (0, 8, 64), (0, 0, 24)])
def test_what_is_not_aligned_is_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be copied"):
        copy_pages_at(*wrong, torch.zeros(2, 1, dtype=torch.int32))


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from penstock.kernels.copy_pages import _WORDS, _copy_kernel

names = ("src_address", "dst_address", "pages", "count", "page_words")
signature = dict(zip(names, ("i64", "i64", "*i32", "i32", "i32"))) | {"WORDS": "constexpr", "WHOLE": "constexpr"}
aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name != "count"}
for whole in (True, False):
    source = ASTSource(_copy_kernel, signature, {"WORDS": _WORDS, "WHOLE": whole}, aligned)
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"])
    print("====")
"""


def test_the_compiled_kernel_moves_sixteen_bytes_at_a_time() -> None:
    """Compiling needs no card, but a process that does not interpret. Addresses, and words a page, are multiples of 16
    where pages have 128 bytes or more."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    whole, masked, _ = compiled.stdout.split("====")
    for ptx in (whole, masked):
        moves = re.findall(r"(?:ld|st)\.global\S*(?:v2\.b64|v4\.b32|\.b64)", ptx)
        assert len(moves) == 2 * module._WORDS // 128 // 2, "eight reads and eight writes a thread"
        assert all("v2.b64" in move or "v4.b32" in move for move in moves)
