"""The embedding of a step's tokens: rows of a table. Torch's own cannot be launched dependently (kernels/launch.py)."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options, use_triton

_BLOCK = 1024  # a 16-byte access of a 2-byte type a thread


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """table[token_ids]: int64 [T] and [vocab, n] give [T, n]. On CUDA ids are not checked: who takes prompts has to."""
    if use_triton(table):
        return embed_triton(token_ids, table)
    return F.embedding(token_ids, table)


def embed_triton(token_ids: Tensor, table: Tensor) -> Tensor:
    """`embed` of contiguous ids and a contiguous table."""
    tokens, n = len(token_ids), table.shape[1]
    out = table.new_empty(tokens, n)
    _embed_kernel[(tokens, -(-n // _BLOCK))](token_ids, table, out, N=n, BLOCK=_BLOCK, **pdl_options(table))
    return out


@triton.jit(do_not_specialize_on_alignment=["token_ids"])
def _embed_kernel(
    token_ids,  # [T]
    table,  # [vocab, N]
    out,  # [T, N]
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row)
    tl.store(out + row * N + column, tl.load(table + token * N + column, mask=column < N), mask=column < N)
