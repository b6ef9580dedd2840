"""Log-probabilities of drawn tokens under the raw distribution, their ranks, and the likeliest tokens, on the device.

As engine/sampler.py computes them on the CPU. A first kernel takes each split of a row's log-sum-exp and counts the
logits above the token's, a second joins the splits; the likeliest tokens are torch.topk's. The rank compares logits: of
tokens whose log-probabilities are equal by rounding only, the CPU's rank is the same for all. Fit for a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import num_multiprocessors, pdl_options, use_triton

Logprobs = tuple[Tensor, Tensor, Tensor, Tensor]

_MAX_SPLITS = 64  # a power of 2
_NEVER = tl.constexpr(float("-inf"))


def token_logprobs(logits: Tensor, tokens: Tensor, top: int) -> Logprobs:
    """(logprob [n] float32, rank [n] int64, top_ids [n, top] int64, top_logprobs [n, top] float32).

    Args:
        logits: `[n, vocab]` bfloat16, float16 or float32; rows may have any stride. Not changed.
        tokens: `[n]` int64, the token of each row; its rank is 1 where no other is likelier.
        top: how many of the likeliest tokens, from 0; at most vocab come.
    """
    if use_triton(logits):
        return token_logprobs_triton(logits, tokens, top)
    return token_logprobs_reference(logits, tokens, top)


def token_logprobs_reference(logits: Tensor, tokens: Tensor, top: int) -> Logprobs:
    """`token_logprobs` in plain PyTorch."""
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, tokens[:, None])
    ranks = (logits > logits.gather(-1, tokens[:, None])).sum(dim=-1) + 1
    values, ids = logprobs.topk(min(top, logits.shape[-1]), dim=-1)
    return chosen[:, 0], ranks, ids, values


@triton.jit(do_not_specialize=["tiles"])
def _split_kernel(
    logits_ptr,
    logits_stride,
    tokens_ptr,
    maximum_ptr,
    sum_ptr,
    above_ptr,
    vocab,
    tiles,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A split's maximum, sum of exponentials relative to it, and count of logits above the token's."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logits = logits_ptr + row.to(tl.int64) * logits_stride
    chosen = tl.load(logits + tl.load(tokens_ptr + row)).to(tl.float32)
    first = split * tiles * TILE
    last = tl.minimum(first + tiles * TILE, vocab)
    # Each lane keeps its own maximum: lanes are joined once, after the pass. -inf minus -inf is never taken.
    most = tl.full([TILE], _NEVER, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    above = tl.zeros([TILE], tl.int32)
    for start in range(first, last, TILE):
        ids = start + tl.arange(0, TILE)
        x = tl.load(logits + ids, mask=ids < last, other=_NEVER).to(tl.float32)
        above += (x > chosen).to(tl.int32)
        larger = tl.maximum(most, x)
        base = tl.where(larger == _NEVER, 0.0, larger)
        total = total * tl.exp(most - base) + tl.exp(x - base)
        most = larger
    maximum = tl.max(most)
    base = tl.where(maximum == _NEVER, 0.0, maximum)
    at = row * SPLITS + split
    tl.store(maximum_ptr + at, maximum)
    tl.store(sum_ptr + at, tl.sum(total * tl.exp(most - base)))
    tl.store(above_ptr + at, tl.sum(above))


@triton.jit(do_not_specialize=["top", "splits"])
def _join_kernel(
    logits_ptr,
    logits_stride,
    tokens_ptr,
    maximum_ptr,
    sum_ptr,
    above_ptr,
    logprob_ptr,
    rank_ptr,
    top_ptr,
    top,
    splits,
    SPLITS: tl.constexpr,
    TOP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Joins the splits of a row; the row's `top` largest logits become log-probabilities in place."""
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    lanes = tl.arange(0, SPLITS)
    at = row * SPLITS + lanes
    most = tl.load(maximum_ptr + at, mask=lanes < splits, other=_NEVER)
    total = tl.load(sum_ptr + at, mask=lanes < splits, other=0.0)
    above = tl.load(above_ptr + at, mask=lanes < splits, other=0)
    maximum = tl.max(most)
    logs = tl.log(tl.sum(total * tl.exp(most - maximum)))
    chosen = tl.load(logits_ptr + row.to(tl.int64) * logits_stride + tl.load(tokens_ptr + row)).to(tl.float32)
    # As log_softmax: the maximum is taken off first, since the sum of both loses what large logits have.
    tl.store(logprob_ptr + row, chosen - maximum - logs)
    tl.store(rank_ptr + row, tl.sum(above).to(tl.int64) + 1)
    for start in range(0, top, TOP):
        columns = start + tl.arange(0, TOP)
        value = tl.load(top_ptr + row * top + columns, mask=columns < top, other=0.0)
        tl.store(top_ptr + row * top + columns, value - maximum - logs, mask=columns < top)


def _tiling(rows: int, vocab: int, tile: int, multiprocessors: int) -> tuple[int, int]:
    """(splits of a row, tiles of a split): some 8 programs a multiprocessor, if there is work for them."""
    tiles = -(-vocab // tile)
    splits = min(tiles, _MAX_SPLITS, max(1, 8 * multiprocessors // rows))
    each = -(-tiles // splits)
    return -(-tiles // each), each


def token_logprobs_triton(logits: Tensor, tokens: Tensor, top: int, *, tile: int = 2048) -> Logprobs:
    """`token_logprobs` by Triton kernels; tile, a power of 2: how many tokens a program looks at together."""
    rows, vocab = logits.shape
    device = logits.device
    top = min(top, vocab)
    scratch = torch.empty(3, rows, _MAX_SPLITS, dtype=torch.float32, device=device)
    maximum, total, above = scratch[0], scratch[1], scratch[2].view(torch.int32)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    ranks = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        empty = logprobs.new_empty(0, top)
        return logprobs, ranks, empty.long(), empty
    if top:
        values, top_ids = logits.topk(top, dim=-1)
        top_logprobs = values.float()
    else:
        top_logprobs = torch.empty(rows, 0, dtype=torch.float32, device=device)
        top_ids = torch.empty(rows, 0, dtype=torch.int64, device=device)
    options = pdl_options(logits)
    stride = logits.stride(0)
    splits, tiles = _tiling(rows, vocab, tile, num_multiprocessors(logits.device))
    _split_kernel[(rows, splits)](
        logits, stride, tokens, maximum, total, above, vocab, tiles,
        SPLITS=_MAX_SPLITS, TILE=tile, num_warps=4, **options,
    )  # fmt: skip
    _join_kernel[(rows,)](
        logits, stride, tokens, maximum, total, above, logprobs, ranks, top_logprobs, top, splits,
        SPLITS=_MAX_SPLITS, TOP=32, num_warps=1, **options,
    )  # fmt: skip
    return logprobs, ranks, top_ids, top_logprobs
