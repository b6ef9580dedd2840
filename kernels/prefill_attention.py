"""Attention of prompt chunks over the paged KV cache: sequences of any lengths, behind any cached past.

`prefill_attention` is called once a layer with the step's batch. Long chunks may go to cuDNN one by one (`LongPrompt`),
all others to one launch of a kernel of ours; what this needs is worked out for the first layer and kept on the batch. A
captured step knows no lengths on the host and is one launch. `uses_cudnn` and `kernel_for` are the rules of choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.cudnn_attention import HEAD_DIMS, UNIT, LongPrompt, Scratch
from penstock.kernels.launch import use_triton
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.prefill_hopper import BLOCK_M, prefill_attention_hopper, supports_hopper
from penstock.kernels.prefill_triton import prefill_attention_triton


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: PagedBatch,
    first: int,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "AUTO",
    out: Tensor,
) -> None:
    """Causal attention of the new tokens of the batch's sequences from `first` on, into their rows of `out`.

    Args:
        q: [T, num_heads, head_dim], all sequences' new tokens.
        k_pages: [num_pages, num_kv_heads, page_size, head_dim], a head's page contiguous; the new tokens are stored.
        v_pages: the same, with k_pages' strides.
        batch: the step.
        first: the sequences before it are not looked at.
        scale: factor of the scores.
        sliding_window: w: a token sees itself and the w - 1 tokens before it.
        soft_cap: c: scores become c * tanh(scores / c) (Gemma 2).
        sinks: [num_heads], a logit for each head that takes weight and gives no value (gpt-oss).
        backend: AUTO, or where it can do it CUDNN or HOPPER, else and by name TRITON.
        out: [T, num_heads, head_dim].
    """
    plain = sliding_window is None and soft_cap is None and sinks is None
    key = ("prefill", first, q.shape[1:], k_pages.shape[1], q.dtype, plain, backend)
    plan = batch.plans.get(key)
    if plan is None:
        plan = batch.plans[key] = _plan(q, k_pages, batch, first, plain, backend)
    for prompt in plan.long:
        prompt.attend(q, k_pages, v_pages, batch.page_tables, scale=scale, out=out)
    if plan.kernel is not None:
        plan.kernel(
            q,
            k_pages,
            v_pages,
            batch.page_tables,
            plan.table_rows,
            plan.query_starts,
            plan.contexts,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
            max_query_len=plan.max_query_len,
            max_context=plan.max_context,
            out=out,
        )


@dataclass(frozen=True)
class _Plan:
    """Who computes what, for every layer of a step."""

    long: tuple[LongPrompt, ...]
    kernel: Callable[..., None] | None  # for the others; none if all are long
    table_rows: Tensor  # int32 [S]
    query_starts: Tensor  # int32 [S + 1]
    contexts: Tensor  # int32 [S], 0 for those that are long
    max_query_len: int
    max_context: int


def _plan(q: Tensor, k_pages: Tensor, batch: PagedBatch, first: int, plain: bool, backend: str) -> _Plan:
    table_rows, contexts = batch.table_rows[first:], batch.contexts[first:]
    query_starts = batch.query_starts[first:]
    if not batch.context_lens:  # captured: the host knows bounds only
        tokens = q.shape[0] - first
        kernel = kernel_for(q, k_pages, tokens, backend)
        return _Plan((), kernel, table_rows, query_starts, contexts, tokens, batch.max_context)
    long: dict[int, LongPrompt] = {}
    scratch = Scratch(q, k_pages.shape[1])
    token = sum(batch.query_lens[:first])
    for i in range(first, len(batch.query_lens)):
        queries, past = batch.query_lens[i], batch.context_lens[i] - batch.query_lens[i]
        if plain and uses_cudnn(q, k_pages.shape[2], queries, backend):
            row, context = batch.table_rows[i : i + 1], batch.contexts[i : i + 1]
            long[i] = LongPrompt.plan(token, queries, row, context, past, scratch)
        token += queries
    others = [i for i in range(first, len(batch.query_lens)) if i not in long]
    if not others:
        return _Plan(tuple(long.values()), None, table_rows, query_starts, contexts, 0, 0)
    if long:
        contexts = contexts.clone()
        for i in long:
            contexts[i - first].zero_()
    longest = max(batch.query_lens[i] for i in others)
    return _Plan(
        tuple(long.values()),
        kernel_for(q, k_pages, longest, backend),
        table_rows,
        query_starts,
        contexts,
        longest,
        max(batch.context_lens[i] for i in others),
    )


def uses_cudnn(q: Tensor, page_size: int, new_tokens: int, backend: str) -> bool:
    """Whether a chunk without window, cap or sinks goes to cuDNN: long ones in half precision.

    Measured on an H200, 8192 tokens of 32/8 heads: cuDNN 622 TFLOP/s, the Hopper kernel 625, the Triton kernel 404.
    """
    able = q.is_cuda and q.element_size() == 2 and q.shape[2] in HEAD_DIMS and torch.backends.cudnn.is_available()
    if backend == "AUTO":
        return able and new_tokens >= UNIT and not supports_hopper(q, page_size)
    return able and backend == "CUDNN"


def kernel_for(q: Tensor, k_pages: Tensor, max_query_len: int, backend: str) -> Callable[..., None]:
    """Which kernel takes the sequences that do not go to cuDNN.

    The Hopper kernel needs rows for both of its groups.
    """
    if not use_triton(q):
        return prefill_attention_reference
    fills = max_query_len * (q.shape[1] // k_pages.shape[1]) >= BLOCK_M
    if backend in ("AUTO", "HOPPER") and fills and supports_hopper(q, k_pages.shape[2]):
        return prefill_attention_hopper
    return prefill_attention_triton


def prefill_attention_reference(
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
    """The same over the batch's tensors, in plain PyTorch: a sequence at a time, in float32."""
    num_heads, num_kv_heads, page_size = q.shape[1], k_pages.shape[1], k_pages.shape[2]
    starts = query_starts.tolist()
    for s, (row, context) in enumerate(zip(table_rows.tolist(), contexts.tolist(), strict=True)):
        begin, end = starts[s], starts[s + 1]
        if begin == end or context == 0:
            continue
        pages = page_tables[row, : -(-context // page_size)].long()
        k, v = (
            x[pages].transpose(0, 1).flatten(1, 2)[:, :context].float().repeat_interleave(num_heads // num_kv_heads, 0)
            for x in (k_pages, v_pages)
        )  # [num_heads, context, head_dim]
        scores = q[begin:end].transpose(0, 1).float() @ k.transpose(1, 2) * scale
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        seen_by = torch.arange(context - (end - begin), context, device=q.device)[:, None]
        token = torch.arange(context, device=q.device)
        unseen = token > seen_by
        if sliding_window is not None:
            unseen |= token <= seen_by - sliding_window
        scores.masked_fill_(unseen, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, end - begin, 1)), -1)
        weights = scores.softmax(-1)[..., :context]
        out[begin:end] = (weights @ v).transpose(0, 1).to(out.dtype)
