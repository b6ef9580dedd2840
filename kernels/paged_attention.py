"""Attention over a paged KV cache: prompts (whole or in chunks) and decode rows in one call, any page table.

Models call `begin_attention` once a step and `paged_attention` once a layer with the step's `PagedBatch`; what is the
same for every layer (indices, masks, who computes what) is worked out once and kept on it. On CUDA sequences with one
new token go to decode_attention.py, the others to prefill_attention.py; the plain PyTorch form for CPU is here.

A page cache is a view [num_pages, num_kv_heads, page_size, head_dim] with any strides in which one head's page is
contiguous and the first two dimensions can be flattened without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.decode_attention import DecodePlan, decode_attention
from penstock.kernels.launch import use_triton
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.prefill_attention import prefill_attention


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "AUTO",
) -> Tensor:
    """Causal attention of q [T, num_heads, head_dim] over each sequence's cached context; the same shape comes back.

    Keys and values of the new tokens must already be stored. Grouped-query attention: num_heads is a multiple of the
    cache's heads. With a sliding window w, a token sees itself and the w - 1 tokens before it.

    Args:
        soft_cap, sinks: as in `decode_attention`; on CUDA only.
        backend: what computes prompts on CUDA, see `prefill_attention`.

    Raises:
        ValueError: soft_cap or sinks on CPU.
        RuntimeError: on CUDA, where `begin_attention` has not been called for this step and window.
    """
    if not use_triton(q):
        if soft_cap is not None or sinks is not None:
            raise ValueError("soft caps and sinks are not supported on CPU")
        return paged_attention_reference(q, k_pages, v_pages, batch, scale=scale, sliding_window=sliding_window)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
    decodes, sequences = batch.num_decodes, batch.contexts.shape[0]
    if decodes:
        plan = batch.plans.get(("decode", sliding_window, num_kv_heads, head_dim))
        if plan is None:
            raise RuntimeError("begin_attention was not called for this step")
        decode_attention(
            q if decodes == sequences else q[:decodes],
            k_pages,
            v_pages,
            batch.page_tables,
            scale=scale,
            soft_cap=soft_cap,
            sinks=sinks,
            plan=plan,
            out=out,
        )
    if decodes < sequences:
        prefill_attention(
            q,
            k_pages,
            v_pages,
            batch,
            decodes,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
            backend=backend,
            out=out,
        )
    return out


def begin_attention(batch: PagedBatch, windows: Iterable[int | None], num_kv_heads: int, head_dim: int) -> None:
    """Share out a step's decodes for layers with these sliding windows; nothing on CPU.

    For every step anew, also where the batch is the same (a captured step's, replayed with other lengths), and before
    its embedding (launch.py).
    """
    decodes, sequences = batch.num_decodes, batch.contexts.shape[0]
    if not decodes or not use_triton(batch.contexts):
        return
    rows, contexts = batch.table_rows, batch.contexts
    if decodes < sequences:
        rows, contexts = rows[:decodes], contexts[:decodes]
    for window in dict.fromkeys(windows):
        key = ("decode", window, num_kv_heads, head_dim)
        if key not in batch.plans:
            batch.plans[key] = DecodePlan.allocate(decodes, 1, num_kv_heads, head_dim, window, contexts.device)
        batch.plans[key].lay_out(rows, contexts)


def paged_attention_reference(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, batch: PagedBatch, *, scale: float, sliding_window: int | None
) -> Tensor:
    """`paged_attention` in plain PyTorch: sequences of similar length in one product, prompts one by one."""
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[1]
    grouped = q.view(tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    parts = _parts(batch, num_kv_heads, sliding_window, q.dtype)
    if len(parts) == 1:
        return parts[0].attend(grouped, k_pages, v_pages, scale).reshape(tokens, num_heads, head_dim)
    out = torch.empty_like(grouped, memory_format=torch.contiguous_format)
    for part in parts:
        out[part.tokens] = part.attend(grouped[part.tokens], k_pages, v_pages, scale)
    return out.view(tokens, num_heads, head_dim)


@dataclass(frozen=True)
class _Part:
    """Tokens that are attended to in one call: decode rows of several sequences, or the new tokens of one."""

    tokens: Tensor | slice  # which of the T tokens
    decode: bool
    rows: Tensor  # [N * num_kv_heads * P] int64: page id * num_kv_heads + head, of N sequences
    num_sequences: int
    keys: slice  # the tokens of the gathered pages that are used
    mask: Tensor | None  # added to the scores
    stale: tuple[Tensor, Tensor] | None  # (sequence, token) pairs past their sequence's end

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float) -> Tensor:
        """q [n, num_kv_heads, group, head_dim] -> the same."""
        k, v = self._gather(k_pages), self._gather(v_pages)
        if self.decode:  # the heads of a group stand in for query positions: nothing is repeated
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scale)
        k = k.transpose(0, 1).expand(-1, q.shape[2], -1, -1)
        v = v.transpose(0, 1).expand(-1, q.shape[2], -1, -1)
        out = F.scaled_dot_product_attention(
            q.permute(1, 2, 0, 3), k, v, attn_mask=self.mask, is_causal=self.mask is None, scale=scale
        )
        return out.permute(2, 0, 1, 3)

    def _gather(self, pages: Tensor) -> Tensor:
        """The sequences' keys or values, [N, num_kv_heads, tokens, head_dim]."""
        _, num_kv_heads, page_size, head_dim = pages.shape
        by_head = pages.view(-1, page_size, head_dim)
        out = by_head.index_select(0, self.rows).view(self.num_sequences, num_kv_heads, -1, head_dim)
        if self.stale is not None:  # an earlier owner's NaN times a weight of zero would still be NaN
            out[self.stale[0], :, self.stale[1]] = 0
        return out[:, :, self.keys]


def _parts(batch: PagedBatch, num_kv_heads: int, window: int | None, dtype: torch.dtype) -> list[_Part]:
    """The pieces in which attention is computed; made on first use, then the same for every layer."""
    key = (num_kv_heads, window, dtype)
    if key not in batch.plans:
        batch.plans[key] = list(_plan(batch, num_kv_heads, window, dtype))
    parts: list[_Part] = batch.plans[key]
    return parts


def _plan(batch: PagedBatch, num_kv_heads: int, window: int | None, dtype: torch.dtype) -> Iterator[_Part]:
    """Decode rows in groups of similar length (padding at most doubles the work), then one part a prompt chunk."""
    groups: dict[int, list[int]] = {}
    start = 0
    prompts: list[tuple[int, int]] = []
    starts: list[int] = []
    for i, (query, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        if query == 1:
            seen = context if window is None else min(context, window)
            groups.setdefault((-(-seen // batch.page_size)).bit_length(), []).append(i)
        else:
            prompts.append((i, start))
        starts.append(start)
        start += query
    for members in groups.values():
        yield _decode_part(batch, members, starts, num_kv_heads, window, dtype)
    for sequence, first_token in prompts:
        yield _prompt_part(batch, sequence, first_token, num_kv_heads, window, dtype)


def _decode_part(
    batch: PagedBatch, members: list[int], starts: list[int], num_kv_heads: int, window: int | None, dtype: torch.dtype
) -> _Part:
    size, device = batch.page_size, batch.slots.device
    contexts = [batch.context_lens[i] for i in members]
    lows = [0 if window is None else max(0, context - window) for context in contexts]  # first token that is seen
    first_pages = [low // size for low in lows]
    width = max(-(-context // size) - first for context, first in zip(contexts, first_pages, strict=True))

    index = torch.tensor(members, device=device)
    ends = torch.tensor(contexts, device=device)[:, None]
    begins = torch.tensor(first_pages, device=device)[:, None]
    columns = torch.minimum(begins + torch.arange(width, device=device), (ends - 1) // size)  # padding: own last page
    pages = batch.page_tables[index[:, None], columns]

    spans = {
        (low - first * size, end - first * size) for low, end, first in zip(lows, contexts, first_pages, strict=True)
    }
    keys, mask, stale = slice(None), None, None
    if len(spans) == 1:  # all alike: cut instead of masking
        keys = slice(*spans.pop())
    else:
        token = begins * size + torch.arange(width * size, device=device)
        past = token >= ends
        unseen = past | (token < torch.tensor(lows, device=device)[:, None])
        mask = torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, float("-inf"))[:, None, None]
        sequence, position = torch.nonzero(past, as_tuple=True)
        stale = (sequence, position)
    whole = members == list(range(len(batch.query_lens)))
    tokens = slice(None) if whole else torch.tensor([starts[i] for i in members], device=device)
    return _Part(tokens, True, _head_rows(pages, num_kv_heads), len(members), keys, mask, stale)


def _prompt_part(
    batch: PagedBatch, sequence: int, first_token: int, num_kv_heads: int, window: int | None, dtype: torch.dtype
) -> _Part:
    size, device = batch.page_size, batch.slots.device
    query, context = batch.query_lens[sequence], batch.context_lens[sequence]
    past = context - query
    low = 0 if window is None else max(0, past + 1 - window)  # what the first new token still sees
    first_page = low // size
    pages = batch.page_tables[sequence, first_page : -(-context // size)][None]
    mask = None
    if past or (window is not None and window < context):
        seen_by = torch.arange(past, context, device=device)[:, None]
        token = torch.arange(low, context, device=device)
        unseen = token > seen_by
        if window is not None:
            unseen |= token <= seen_by - window
        mask = torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, float("-inf"))
    keys = slice(low - first_page * size, context - first_page * size)
    tokens = slice(first_token, first_token + query)
    return _Part(tokens, False, _head_rows(pages, num_kv_heads), 1, keys, mask, None)


def _head_rows(pages: Tensor, num_kv_heads: int) -> Tensor:
    """[N, P] page ids -> rows of a cache flattened over (page, head), ordered [N, num_kv_heads, P]."""
    return (pages[:, None] * num_kv_heads + torch.arange(num_kv_heads, device=pages.device)[:, None]).flatten()
