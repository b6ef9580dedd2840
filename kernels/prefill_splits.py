"""Prefill attention whose rows' contexts are shared by several programs, the splits: how many, and joining their parts.

A kernel that splits writes, for every split of a row, the weighted mean of the values it saw and the logarithm of the
weights' sum; `Parts` holds them, `join` makes the result of them. The mass of a split that saw nothing says so; its
mean is not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options

NOTHING: tl.constexpr = tl.constexpr(-1e30)
"""The mass of a split that saw no key. Finite, so that no difference of two is NaN."""
_JOINED_ROWS = 32  # heads times splits that a program loads together: 32 registers of a thread for rows of 128 numbers


@dataclass(frozen=True)
class Parts:
    """What the splits of a launch leave."""

    means: Tensor  # float32 [splits, T, num_heads, head_dim]
    masses: Tensor  # float32 [splits, T, num_heads], log2 of a sum of weights

    @classmethod
    def allocate(cls, splits: int, q: Tensor) -> Parts:
        """For q [T, num_heads, head_dim]."""
        return cls(
            torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device),
            torch.empty((splits, *q.shape[:2]), dtype=torch.float32, device=q.device),
        )

    def join(self, sinks: Tensor | None, query_starts: Tensor, contexts: Tensor, out: Tensor) -> None:
        """Into out [T, num_heads, head_dim], the rows of sequences whose context is not 0; others are left alone."""
        splits, num_tokens, num_heads, head_dim = self.means.shape
        num_sequences = contexts.shape[0]
        together = _joined_splits(splits)
        heads = _JOINED_ROWS // together
        _join_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
            self.means,
            self.masses,
            sinks,
            query_starts,
            contexts,
            out,
            num_sequences,
            num_tokens,
            out.stride(0),
            out.stride(1),
            splits,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            SINKS=sinks is not None,
            BLOCK_S=max(128, triton.next_power_of_2(num_sequences)),
            BLOCK_H=heads,
            TOGETHER=together,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            num_warps=4,
            **pdl_options(out),
        )


def _joined_splits(splits: int) -> int:
    """How many of them a program loads together. Many splits are of few tokens, whose programs have time for few turns.

    Measured on an H200: 32 splits of 16 tokens take 8.2 us four at a time, 4.2 eight and 3.2 sixteen at a time; three
    of 152 tokens 2.6, 3.9 and 9.4.
    """
    if splits > 16:
        return 16
    return 8 if splits > 4 else 4


def splits_for(programs: int, resident: int, max_context: int, keys: int) -> int:
    """Splits of each of `programs` programs, of which `resident` are there at a time and go through blocks of `keys`.

    The longest context there may be shall have at least four blocks of keys a split: joining has a cost.
    """
    return max(1, min(resident // max(1, programs), max_context // (4 * keys)))


# What changes from step to step must not have a kernel of its own.
@triton.jit(
    do_not_specialize=["num_sequences", "num_tokens", "splits"],
    do_not_specialize_on_alignment=["query_starts_ptr", "contexts_ptr"],
)
def _join_kernel(
    means_ptr, masses_ptr, sinks_ptr, query_starts_ptr, contexts_ptr, out_ptr, num_sequences, num_tokens,
    out_token_stride, out_head_stride, splits, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weighted means of the splits' results: some heads of a token."""
    token = tl.program_id(0)
    # Which sequence a token is of is as old as the step: read while the kernel ahead still runs (launch.py).
    index = tl.arange(0, BLOCK_S)
    starts = tl.load(query_starts_ptr + index, mask=index < num_sequences, other=num_tokens)
    sequence = tl.maximum(tl.sum((starts <= token).to(tl.int32), 0) - 1, 0)
    begun = token >= tl.load(query_starts_ptr)
    ended = token >= tl.load(query_starts_ptr + num_sequences)
    skipped = ended | (tl.load(contexts_ptr + sequence) == 0) | (begun == 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if skipped:
        return
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_H], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=head < NUM_HEADS, other=0.0).to(tl.float32)
        top = sink * 1.4426950408889634
        total += 1.0
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for first in range(0, splits, TOGETHER):
        parts = ()  # all loads are under way before the first is used
        for i in tl.static_range(TOGETHER):
            row = ((first + i) * num_tokens + token) * NUM_HEADS + head
            mass = tl.load(masses_ptr + row, mask=(head < NUM_HEADS) & (first + i < splits), other=NOTHING)
            # Not loaded where nothing was seen: nothing was written, and what lies there may be NaN.
            used = (mass > NOTHING)[:, None] & (column < HEAD_DIM)[None, :]
            mean = tl.load(means_ptr + row.to(tl.int64)[:, None] * HEAD_DIM + column[None, :], mask=used, other=0.0)
            parts += ((mass, mean),)  # type: ignore[assignment]  # compiled: a longer tuple
        for i in tl.static_range(TOGETHER):
            new_top = tl.maximum(top, parts[i][0])
            fade, weight = tl.exp2(top - new_top), tl.exp2(parts[i][0] - new_top)
            total = total * fade + weight
            acc = acc * fade[:, None] + parts[i][1] * weight[:, None]
            top = new_top
    where = token.to(tl.int64) * out_token_stride + head[:, None] * out_head_stride + column[None, :]
    valid = (head < NUM_HEADS)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out_ptr + where, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid)
