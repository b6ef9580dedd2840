"""Attention of one long prompt chunk through the cuDNN that comes with PyTorch, joined from two dense products.

cuDNN plans are made for exact shapes and take tens of milliseconds, so all shapes here are multiples of UNIT. With
`past` tokens before the chunk and `split` = past rounded down to UNIT, the new tokens meet the keys [0, split) without
a mask and the keys from `split` on in a causal square, where rows of padding stand for the positions split to past and
for what follows the chunk. The two results are joined by their log-sum-exps (Milakov and Gimelshein 2018).

The context's keys and values are first gathered from their pages into one buffer that all layers of a step share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options

UNIT = 1024
HEAD_DIMS = (64, 128)
_COPY_TOKENS = 32
_JOIN_HEADS = 8


class Scratch:
    """Buffers for one prompt at a time, as large as the largest of a step: its prompts and layers come one by one."""

    def __init__(self, like: Tensor, num_kv_heads: int) -> None:
        """like: the step's q [T, num_heads, head_dim]."""
        self._empty = like.new_empty(0)
        _, self._num_heads, self._head_dim = like.shape
        self._num_kv_heads = num_kv_heads
        self._rows = self._num_keys = 0
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None

    def reserve(self, rows: int, num_keys: int) -> None:
        """One of the prompts will take so much."""
        self._rows, self._num_keys = max(self._rows, rows), max(self._num_keys, num_keys)

    def take(self, rows: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [rows, num_heads, head_dim], keys and values [num_keys, num_kv_heads, head_dim].

        The queries are what was last written, or zeros: finite, so that rows of padding are.
        """
        if self._buffers is None:
            keys, values = self._empty.new_empty(2, self._num_keys, self._num_kv_heads, self._head_dim)
            self._buffers = self._empty.new_zeros(self._rows, self._num_heads, self._head_dim), keys, values
        queries, keys, values = self._buffers
        return queries[:rows], keys[:num_keys], values[:num_keys]


@dataclass(frozen=True)
class LongPrompt:
    """Shapes of one sequence's parts, and what its layers share."""

    first_token: int  # its first row of q
    num_tokens: int  # new ones
    lead: int  # rows of padding before them in the square
    split: int  # keys of the part without a mask
    square: int  # rows and keys of the causal part
    wide: int  # rows of the part without a mask
    table_row: Tensor  # int32 [1]
    context: Tensor  # int32 [1]
    padded: int  # rows of the queries with padding; 0 where q is aligned by itself
    num_keys: int  # split + square
    scratch: Scratch

    @classmethod
    def plan(
        cls,
        first_token: int,
        num_tokens: int,
        table_row: Tensor,
        context: Tensor,
        past: int,
        scratch: Scratch,
    ) -> LongPrompt:
        """For `num_tokens` new tokens behind `past` cached ones; `scratch` is shared by the prompts of a step."""
        step = _granularity(past)
        split = past // step * step
        lead = past - split
        square = _round_up(lead + num_tokens)
        wide = _round_up(num_tokens)
        aligned = lead == 0 and square == num_tokens
        padded = 0 if aligned else max(square, lead + wide)
        scratch.reserve(padded, split + square)
        return cls(
            first_token, num_tokens, lead, split, square, wide, table_row, context, padded, split + square, scratch
        )

    def attend(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, page_tables: Tensor, *, scale: float, out: Tensor
    ) -> None:
        """Causal attention of the chunk's rows of q [T, num_heads, head_dim] into the same rows of out."""
        rows = slice(self.first_token, self.first_token + self.num_tokens)
        queries = q[rows]
        padded, keys, values = self.scratch.take(self.padded, self.num_keys)
        if self.padded:
            padded[self.lead : self.lead + self.num_tokens] = queries
            queries = padded
        gather_pages(k_pages, v_pages, page_tables, self.table_row, self.context, keys, values)
        near, near_mass = _dense(queries[: self.square], keys[self.split :], values[self.split :], True, scale)
        if self.split == 0:
            out[rows] = near[self.lead : self.lead + self.num_tokens]
            return
        if self.padded:
            queries = queries[self.lead : self.lead + self.wide]
        far, far_mass = _dense(queries, keys[: self.split], values[: self.split], False, scale)
        join_parts(near[self.lead :], near_mass[self.lead :], far, far_mass, out[rows])


def _round_up(tokens: int) -> int:
    return -(-tokens // UNIT) * UNIT


def _granularity(past: int) -> int:
    """Longer pasts are split at coarser places: fewer plans, and the square grows by an eighth of the past at most."""
    return max(UNIT, (1 << past.bit_length()) // 16)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q [n, num_heads, dim] over k, v [m, num_kv_heads, dim] -> as q, and log-sum-exps, float32 [n, num_heads]."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    if q.is_cuda:
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        out, mass = result[0], result[1]
    else:
        group = q.shape[1] // k.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        out, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    return out[0].transpose(0, 1), mass.view(q.shape[1], q.shape[0]).transpose(0, 1)


def gather_pages(
    k_pages: Tensor,
    v_pages: Tensor,
    page_tables: Tensor,
    table_row: Tensor,
    context: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Copy a sequence's first tokens to keys and values, [n, num_kv_heads, head_dim]; zeros behind its context.

    k_pages, v_pages [num_pages, num_kv_heads, page_size, head_dim] with equal strides, one head's page contiguous;
    page_tables int32 [N, W]; table_row and context int32 [1].
    """
    num_tokens, num_kv_heads, head_dim = keys.shape
    _gather_kernel[(triton.cdiv(num_tokens, _COPY_TOKENS), num_kv_heads)](
        k_pages,
        v_pages,
        page_tables,
        table_row,
        context,
        keys,
        values,
        num_tokens,
        page_tables.stride(0),
        k_pages.stride(0),
        k_pages.stride(1),
        NUM_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=k_pages.shape[2],
        BLOCK=_COPY_TOKENS,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
        **pdl_options(keys),
    )


@triton.jit(do_not_specialize_on_alignment=["table_row_ptr", "context_ptr"])
def _gather_kernel(
    k_ptr,
    v_ptr,
    tables_ptr,
    table_row_ptr,
    context_ptr,
    keys_ptr,
    values_ptr,
    num_tokens,
    table_stride,
    page_stride,
    head_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    known = token < tl.load(context_ptr)
    table = tables_ptr + tl.load(table_row_ptr).to(tl.int64) * table_stride
    page = tl.load(table + token // PAGE_SIZE, mask=known, other=0).to(tl.int64)
    source = page * page_stride + head * head_stride + token % PAGE_SIZE * HEAD_DIM
    target = (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    inside = (column < HEAD_DIM)[None, :]
    read = known[:, None] & inside
    write = (token < num_tokens)[:, None] & inside
    k = tl.load(k_ptr + source[:, None] + column[None, :], mask=read, other=0.0)
    v = tl.load(v_ptr + source[:, None] + column[None, :], mask=read, other=0.0)
    tl.store(keys_ptr + target[:, None] + column[None, :], k, mask=write)
    tl.store(values_ptr + target[:, None] + column[None, :], v, mask=write)


def join_parts(a: Tensor, a_mass: Tensor, b: Tensor, b_mass: Tensor, out: Tensor) -> None:
    """out [n, num_heads, head_dim] = the softmax over both parts' keys; the parts may have further rows.

    a, b: [>= n, num_heads, head_dim]; a_mass, b_mass: float32 [>= n, num_heads], natural log-sum-exps, any strides.
    """
    num_tokens, num_heads, head_dim = out.shape
    _join_kernel[(num_tokens, triton.cdiv(num_heads, _JOIN_HEADS))](
        a,
        a_mass,
        b,
        b_mass,
        out,
        a.stride(0),
        a.stride(1),
        a_mass.stride(0),
        a_mass.stride(1),
        b.stride(0),
        b.stride(1),
        b_mass.stride(0),
        b_mass.stride(1),
        out.stride(0),
        out.stride(1),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_H=_JOIN_HEADS,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=2,
        **pdl_options(out),
    )


@triton.jit(do_not_specialize_on_alignment=["a_mass_ptr", "b_mass_ptr"])
def _join_kernel(
    a_ptr,
    a_mass_ptr,
    b_ptr,
    b_mass_ptr,
    out_ptr,
    a_token_stride,
    a_head_stride,
    a_mass_token_stride,
    a_mass_head_stride,
    b_token_stride,
    b_head_stride,
    b_mass_token_stride,
    b_mass_head_stride,
    out_token_stride,
    out_head_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    own = head < NUM_HEADS
    inside = own[:, None] & (column < HEAD_DIM)[None, :]
    a_mass = tl.load(a_mass_ptr + token * a_mass_token_stride + head * a_mass_head_stride, mask=own, other=0.0)
    b_mass = tl.load(b_mass_ptr + token * b_mass_token_stride + head * b_mass_head_stride, mask=own, other=0.0)
    a_share = 1.0 / (1.0 + tl.exp(b_mass - a_mass))
    b_share = 1.0 / (1.0 + tl.exp(a_mass - b_mass))
    a = tl.load(a_ptr + (token * a_token_stride + head * a_head_stride)[:, None] + column[None, :], mask=inside)
    b = tl.load(b_ptr + (token * b_token_stride + head * b_head_stride)[:, None] + column[None, :], mask=inside)
    result = a.to(tl.float32) * a_share[:, None] + b.to(tl.float32) * b_share[:, None]
    where = (token * out_token_stride + head * out_head_stride)[:, None] + column[None, :]
    tl.store(out_ptr + where, result.to(out_ptr.dtype.element_ty), mask=inside)
