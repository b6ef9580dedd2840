"""Decode steps of fixed sizes on the device's own state: captured as CUDA graphs, one launch a step.

A step of n sequences runs in the smallest size that holds them; the rows left over are padding. Sizes are close where
a row costs time (the matrix products of large batches), and far apart where it does not (small ones read the same
weights).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from penstock.engine.batch_state import BatchState
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.sample import SampleWorkspace, sample
from penstock.kernels.step_state import begin_decode
from penstock.models.decoder import CausalLM

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: Tensor  # of the latest replay


def batch_sizes(max_num_seqs: int) -> list[int]:
    """The sizes that are captured: the last one holds max_num_seqs, up to 512."""
    largest = min(max_num_seqs, _SIZES[-1])
    return [size for size in _SIZES if size < largest] + [largest]


class DecodeGraphs:
    """One decode step for every size. Until `capture` has been called, steps run op by op."""

    def __init__(
        self,
        model: CausalLM,
        kv: Sequence[tuple[Tensor, Tensor]],
        state: BatchState,
        workspace: SampleWorkspace,
        tokens_out: Tensor,
        page_size: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        """tokens_out: int64 [turns, rows], pinned: where the host reads the tokens that a step samples, in its turn."""
        self._model, self._kv, self._state, self._workspace = model, kv, state, workspace
        self._tokens_out = tokens_out
        self._sizes = batch_sizes(max_num_seqs)
        self._captured: dict[int, _Captured] = {}
        device = state.device
        self._token_ids, positions, slots = torch.zeros(3, max_num_seqs, dtype=torch.int64, device=device).unbind(0)
        table_rows, contexts = torch.zeros(2, max_num_seqs, dtype=torch.int32, device=device).unbind(0)
        self._batch = PagedBatch(
            query_lens=(1,) * max_num_seqs,
            context_lens=(),
            page_tables=state.tables,
            table_rows=table_rows,
            contexts=contexts,
            query_starts=torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device),
            positions=positions,
            slots=slots,
            page_size=page_size,
            num_decodes=max_num_seqs,
            max_context=max_model_len,
        )
        self._batches: dict[int, PagedBatch] = {}

    def run(self, count: int) -> Tensor:
        """The step of the state's first `count` rows: logits [>= count, vocab], until the next step."""
        at = bisect_left(self._sizes, count)
        size = self._sizes[at] if at < len(self._sizes) else count
        captured = self._captured.get(size)
        if captured is None:
            return self._step(size)
        captured.graph.replay()
        return captured.logits

    @property
    def num_sizes(self) -> int:
        return len(self._sizes)

    def run_empty(self) -> None:
        """A step of every size, op by op; rows must be padding."""
        for size in self._sizes:
            self._step(size)

    def capture(self, pool: Any, captured: Callable[[], None]) -> None:
        """Capture all sizes into the memory pool, largest first, so that the smaller ones find their memory there.

        `captured` is called after each. Must be called in a stream of its own, with no row in use.
        """
        for size in reversed(self._sizes):
            self._step(size)  # allocates what outlives the step
            graph = torch.cuda.CUDAGraph()
            torch.cuda.current_stream().synchronize()
            graph.capture_begin(pool=pool)
            try:
                logits = self._step(size)
            finally:
                graph.capture_end()
            self._captured[size] = _Captured(graph, logits)
            captured()

    def _step(self, size: int) -> Tensor:
        batch, state = self._batch_of(size), self._state
        rows, token_ids = state.rows[:size], self._token_ids[:size]
        begin_decode(
            rows, state.lengths, state.last_tokens, state.tables, batch.page_size, state.turn, len(self._tokens_out),
            token_ids=token_ids, positions=batch.positions, slots=batch.slots,
            table_rows=batch.table_rows, contexts=batch.contexts,
        )  # fmt: skip
        logits = self._model.logits(self._model.forward(token_ids, batch, self._kv))
        sample(
            logits, rows, batch.contexts, state.columns, self._workspace, out=self._tokens_out, turn=state.turn
        )  # fmt: skip
        return logits

    def _batch_of(self, size: int) -> PagedBatch:
        batch = self._batches.get(size)
        if batch is None:
            whole = self._batch
            batch = self._batches[size] = replace(
                whole,
                query_lens=whole.query_lens[:size],
                table_rows=whole.table_rows[:size],
                contexts=whole.contexts[:size],
                query_starts=whole.query_starts[: size + 1],
                positions=whole.positions[:size],
                slots=whole.slots[:size],
                num_decodes=size,
            )
        return batch
