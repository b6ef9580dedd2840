"""Prefill attention for Hopper: what it can do, and its launch; the kernel is in prefill_hopper_kernel.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from penstock.kernels.launch import num_multiprocessors, pdl_options
from penstock.kernels.prefill_hopper_kernel import hopper_kernel
from penstock.kernels.prefill_splits import Parts, splits_for

LOG2_E = 1.4426950408889634
BLOCK_M, BLOCK_N, STAGES = 128, 128, 2
MAX_REGISTERS = 168  # a thread, when the kernel starts; the groups then share them out as 240, 240 and 24


def supports_hopper(q: Tensor, page_size: int) -> bool:
    """Half precision, heads of 64 or 128, pages of 8 or more tokens (a power of two), compute capability 9.0."""
    return (
        q.is_cuda
        and q.element_size() == 2
        and q.shape[2] in (64, 128)
        and page_size >= 8
        and page_size & (page_size - 1) == 0
        and _is_hopper(q.device)
    )


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def shared_layout(head_dim: int) -> gl.NVMMASharedLayout:
    """Of half-precision blocks with rows of head_dim."""
    return gl.NVMMASharedLayout(min(128, head_dim * 2), 16, 2)


@cache
def kernel_constants(
    group: int,
    page_size: int,
    window: bool,
    soft_cap: bool,
    sinks: bool,
    num_sequences: int,
    num_heads: int,
    head_dim: int,
    splits: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "GROUP": group,
        "PAGE_SIZE": page_size,
        "WINDOW": window,
        "SOFT_CAP": soft_cap,
        "SINKS": sinks,
        "NUM_HEADS": num_heads,
        "SPLITS": splits,
        "BLOCK_S": max(128, triton.next_power_of_2(num_sequences)),
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": head_dim,
        "STAGES": STAGES,
    }


def prefill_attention_hopper(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_tables: Tensor,
    table_rows: Tensor,
    query_starts: Tensor,
    contexts: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    max_query_len: int,
    max_context: int,
    out: Tensor,
) -> None:
    """`prefill_attention_triton` for what `supports_hopper` allows; v_pages must lie right behind k_pages."""
    num_tokens, num_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = k_pages.shape
    num_sequences = table_rows.shape[0]
    if num_tokens == 0 or num_sequences == 0:
        return
    group = num_heads // num_kv_heads
    # The whole pool from this layer's first page on, as rows of one head's token.
    page_rows, head_rows = k_pages.stride(0) // head_dim, k_pages.stride(1) // head_dim
    rows = (num_pages - 1) * page_rows + (num_kv_heads - 1) * head_rows + 2 * page_size
    block = [min(page_size, BLOCK_N), head_dim]
    programs = num_kv_heads * triton.cdiv(num_tokens * group, BLOCK_M)
    splits = splits_for(programs, num_multiprocessors(q.device), max_context, BLOCK_N)
    parts = Parts.allocate(splits, q) if splits > 1 else None
    target = out if parts is None else parts.means
    hopper_kernel[(num_kv_heads * splits, num_tokens * group // BLOCK_M + num_sequences)](
        TensorDescriptor(k_pages, [rows, head_dim], [head_dim, 1], block, shared_layout(head_dim)),
        q,
        target,
        None if parts is None else parts.masses,
        sinks,
        page_tables,
        table_rows,
        query_starts,
        contexts,
        num_sequences,
        num_tokens,
        splits,
        page_tables.stride(0),
        q.stride(0),
        q.stride(1),
        target.stride(-3),
        target.stride(-2),
        page_rows,
        head_rows,
        scale * LOG2_E if soft_cap is None else scale,
        0.0 if soft_cap is None else soft_cap,
        sliding_window or 0,
        **kernel_constants(
            group,
            page_size,
            sliding_window is not None,
            soft_cap is not None,
            sinks is not None,
            num_sequences,
            num_heads,
            head_dim,
            parts is not None,
        ),
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        **pdl_options(q),
    )
    if parts is not None:
        parts.join(sinks, query_starts, contexts, out)
