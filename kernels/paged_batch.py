"""Where the tokens of one step sit: which sequence, which position, which slot of which page. Made once a step.

The engine builds a batch; models hand it to the ops that store keys and values and that attend. On CPU the ops plan
with the host's lengths; on CUDA they read everything from the device's tensors, so that a captured graph can be
replayed after the tensors have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """T new tokens of S sequences, flattened, sequence after sequence.

    In a captured step the host's lengths are not known: `context_lens` is empty, and sequences whose context is 0 are
    padding, as are tokens whose slot is -1.
    """

    query_lens: tuple[int, ...]  # new tokens a sequence, >= 1
    context_lens: tuple[int, ...]  # tokens in the cache after this step, new ones included
    page_tables: Tensor  # int32 [N, W], padded with 0
    table_rows: Tensor  # int32 [S]: which row of page_tables is a sequence's
    contexts: Tensor  # int32 [S]: context_lens on the device
    query_starts: Tensor  # int32 [S + 1]: first token of each sequence, and T
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]: page id * page_size + offset where a token's K/V goes
    page_size: int
    num_decodes: int  # the first so many sequences bring one token each
    max_context: int  # no context is longer
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What ops worked out for this batch, the same for every layer: by `begin_attention`, or on their first use."""

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        page_tables: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str,
    ) -> PagedBatch:
        """Lay out a step. A page table may be longer than its context needs.

        Raises:
            ValueError: a length is impossible, or a page table too short for its context.
        """
        needed = [-(-context // page_size) for context in context_lens]
        for query, context, table, pages in zip(query_lens, context_lens, page_tables, needed, strict=True):
            if not 1 <= query <= context:
                raise ValueError(f"a sequence needs 1 <= new tokens <= context, got {query} and {context}")
            if len(table) < pages:
                raise ValueError(f"{context} tokens need {pages} pages of {page_size}, the page table has {len(table)}")
        width = max(needed)
        padded = [list(table[:n]) + [0] * (width - n) for table, n in zip(page_tables, needed, strict=True)]
        tables = torch.tensor(padded, dtype=torch.int32)
        queries = torch.tensor(query_lens, dtype=torch.int64)
        contexts = torch.tensor(context_lens, dtype=torch.int64)
        ends = queries.cumsum(0)
        if max(query_lens) == 1:
            owners = torch.arange(len(query_lens))
            positions = contexts - 1
        else:
            owners = torch.repeat_interleave(queries)
            positions = torch.arange(len(owners)) + (contexts - ends)[owners]
        slots = tables[owners, positions // page_size].long() * page_size + positions % page_size
        return cls(
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            page_tables=tables.to(device),
            table_rows=torch.arange(len(query_lens), dtype=torch.int32, device=device),
            contexts=contexts.int().to(device),
            query_starts=torch.cat((ends.new_zeros(1), ends)).int().to(device),
            positions=positions.to(device),
            slots=slots.to(device),
            page_size=page_size,
            num_decodes=next((i for i, query in enumerate(query_lens) if query > 1), len(query_lens)),
            max_context=max(context_lens),
        )

    def at_ends(self, last_tokens: Tensor) -> PagedBatch:
        """The same sequences with their last token each; `last_tokens` [S] says which of the T tokens those are."""
        sequences = self.contexts.shape[0]
        return replace(
            self,
            query_lens=(1,) * sequences,
            query_starts=torch.arange(sequences + 1, dtype=torch.int32, device=self.contexts.device),
            positions=self.positions.index_select(0, last_tokens),
            slots=self.slots.index_select(0, last_tokens),
            num_decodes=sequences,
        )

    @cached_property
    def slot_pages(self) -> Tensor:
        """Page id of each new token, [T]."""
        return self.slots // self.page_size

    @cached_property
    def slot_offsets(self) -> Tensor:
        """Slot within its page of each new token, [T]."""
        return self.slots % self.page_size

    @cached_property
    def last_rows(self) -> Tensor:
        """Index of each sequence's last new token, [S]: the rows that are sampled from."""
        return self.query_starts[1:].long() - 1
