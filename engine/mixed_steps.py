"""Steps with prompts in them on the device: decoding sequences first, then the chunks of prompts.

A step is laid out for a shape: so many decode rows, prompt tokens and prompts. Some shapes are captured as CUDA graphs:
small ones, since launching a model op by op takes longer than computing a short prompt, and those of the usual full
steps, since a worker's loop that launches does nothing else for 10 to 20 ms. A step runs in the captured shape with the
least padding (`choose_shape`), or is launched op by op in a shape that is exactly its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.common.mixed_chunk import SEQUENCES, chunk_beside
from penstock.engine.batch_state import BatchState, Staging
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.sample import SampleWorkspace, sample
from penstock.kernels.step_state import begin_mixed
from penstock.models.decoder import CausalLM

MAX_PROMPTS = 16  # of a captured shape that also decodes
CHUNK_PROMPTS = 4  # of those for the usual chunk: mostly one prompt, or one that ends and one that begins
_PROMPT_TOKENS = (16, 64, 128, 256, 512, 1024)
_MOST_TOKENS = 2048  # of prompts in a captured shape: larger ones take memory, and launching is little beside computing
_EIGHTHS = (5, 6, 7, 8)  # of a full step beyond _PROMPT_TOKENS, in which others that are so large are captured, too
_LEAST_USED = 4 / 5  # of a shape of those: padding that takes longer to compute than the step to launch is too much


class Chunk(NamedTuple):
    """What a step computes of one sequence."""

    slot: int
    tokens: Sequence[int]  # ids; -1 for the one that the device sampled last
    context: int  # tokens in its pages afterwards
    samples: bool


class Shape(NamedTuple):
    """Room of a step."""

    decodes: int  # sequences with one token
    prompt_tokens: int
    prompts: int

    @property
    def tokens(self) -> int:
        return self.decodes + self.prompt_tokens

    @property
    def sequences(self) -> int:
        return self.decodes + self.prompts

    def holds(self, other: Shape) -> bool:
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def suits(self, other: Shape) -> bool:
        """Holds it; and if it is a large one for prompts alone, without much padding."""
        large = self.decodes == 0 and self.prompt_tokens > _PROMPT_TOKENS[-1]
        return self.holds(other) and (not large or other.prompt_tokens >= _LEAST_USED * self.prompt_tokens)


class _Inputs(NamedTuple):
    """A laid-out step; int32, T tokens, S sequences. What is not used says so: owner, row and sample slot -1."""

    owners: Tensor  # [T] which sequence a token is of
    given: Tensor  # [T] token ids, -1: the sequence's last sampled one
    rows: Tensor  # [S] slots
    table_rows: Tensor  # [S] slots, 0 for padding
    contexts: Tensor  # [S]
    query_starts: Tensor  # [S + 1]
    sample_slots: Tensor  # [S] slots, if a token is sampled
    last_tokens: Tensor  # [S] which of the T tokens is a sequence's last


@dataclass(frozen=True)
class _Captured:
    """A graph, and everything it reads and writes that was allocated before its capture: it must live as long."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # all of `_Inputs`, one after the other
    batch: PagedBatch
    logits: Tensor


def captured_shapes(
    max_num_seqs: int, max_num_batched_tokens: int, mixed_chunk_tokens: int, prompt_step_tokens: int
) -> list[Shape]:
    """Shapes for a prompt alone and for prompts beside few or many sequences that decode, with up to three quarters of
    padding; and, with little, for the steps that come most: chunks beside sequences, and full steps of prompts.

    Padding costs: products compute its rows, and attention's programs without work have to start and end.

    Args:
        mixed_chunk_tokens: of prompts, in a step that also decodes a few; 0 if that can be any number.
        prompt_step_tokens: of prompts, in a full step that decodes nothing; 0 if that can be any number.
    """
    shapes = [Shape(0, count, 1) for count in _PROMPT_TOKENS]
    for decodes in sorted({min(64, max_num_seqs), min(256, max_num_seqs)}):
        shapes += [Shape(decodes, count, MAX_PROMPTS) for count in _PROMPT_TOKENS[1:]]
    if 0 < mixed_chunk_tokens <= _PROMPT_TOKENS[-1]:
        rooms = sorted({min(count, max_num_seqs) for count in SEQUENCES})
        chunks = [Shape(room, chunk_beside(mixed_chunk_tokens, room), CHUNK_PROMPTS) for room in rooms]
        shapes += [shape for shape in chunks if shape not in shapes]
    if 0 < prompt_step_tokens <= _MOST_TOKENS:
        parts = _EIGHTHS if prompt_step_tokens > _PROMPT_TOKENS[-1] else _EIGHTHS[-1:]
        full = [Shape(0, prompt_step_tokens * part // 8, min(MAX_PROMPTS, max_num_seqs)) for part in parts]
        shapes += [shape for shape in full if shape not in shapes]
    return [shape for shape in shapes if shape.tokens <= max_num_batched_tokens + max_num_seqs]


def choose_shape(captured: Iterable[Shape], exact: Shape) -> Shape | None:
    """The one with the least padding that a step of this shape runs in; None: it is launched op by op."""
    suiting = (shape for shape in captured if shape.suits(exact))
    return min(suiting, key=lambda shape: (shape.tokens, shape.prompts), default=None)


def crowds(max_num_seqs: int, max_num_batched_tokens: int) -> list[Shape]:
    """Steps of so many prompts that attention has kernels of their own for them: compiled at the start, not captured.

    Prompts are looked up in a block of 128, or the next power of two (kernels/prefill_*.py).
    """
    tokens = min(_PROMPT_TOKENS[-1], max_num_batched_tokens)
    counts, count = [], 128
    while count < min(max_num_seqs, tokens):
        count *= 2
        counts.append(min(count, max_num_seqs, tokens))
    return [Shape(0, tokens, prompts) for prompts in counts]


def split(chunks: Sequence[Chunk]) -> tuple[Sequence[Chunk], Sequence[Chunk]]:
    """Leading chunks of one token, which attend as decodes do; and the others."""
    count = next((i for i, chunk in enumerate(chunks) if len(chunk.tokens) > 1), len(chunks))
    return chunks[:count], chunks[count:]


def lay_out(chunks: Sequence[Chunk], shape: Shape) -> list[np.ndarray]:
    """The arrays of `_Inputs` for chunks that fit the shape."""
    decodes, prompts = split(chunks)
    numbers = [*range(len(decodes)), *range(shape.decodes, shape.decodes + len(prompts))]
    lengths = [len(chunk.tokens) for chunk in prompts]
    ends = shape.decodes + np.cumsum([0, *lengths])
    owners, given = np.full(shape.tokens, -1, np.int32), np.zeros(shape.tokens, np.int32)
    owners[: len(decodes)] = np.arange(len(decodes))
    owners[shape.decodes : ends[-1]] = np.repeat(np.arange(shape.decodes, shape.decodes + len(prompts)), lengths)
    given[: len(decodes)] = [chunk.tokens[0] for chunk in decodes]
    for chunk, begin, end in zip(prompts, ends, ends[1:], strict=False):
        given[begin:end] = chunk.tokens
    rows, sample_slots = np.full((2, shape.sequences), -1, np.int32)
    contexts, last_tokens = np.zeros((2, shape.sequences), np.int32)
    rows[numbers] = [chunk.slot for chunk in chunks]
    contexts[numbers] = [chunk.context for chunk in chunks]
    sampling = [number for number, chunk in zip(numbers, chunks, strict=True) if chunk.samples]
    sample_slots[sampling] = rows[sampling]
    query_starts = np.full(shape.sequences + 1, ends[-1], np.int32)
    query_starts[: shape.decodes] = np.arange(shape.decodes)
    query_starts[shape.decodes : shape.decodes + len(ends)] = ends
    last_tokens[numbers] = query_starts[np.asarray(numbers, dtype=np.int64) + 1] - 1
    last_tokens[: len(decodes)] = np.arange(len(decodes))
    return [owners, given, rows, np.maximum(rows, 0), contexts, query_starts, sample_slots, last_tokens]


class MixedSteps:
    """Runs steps with prompts. Until `capture` has been called, all op by op."""

    def __init__(
        self,
        model: CausalLM,
        kv: Sequence[tuple[Tensor, Tensor]],
        state: BatchState,
        workspace: SampleWorkspace,
        tokens_out: Tensor,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        mixed_chunk_tokens: int,
        prompt_step_tokens: int,
    ) -> None:
        """tokens_out: as that of `DecodeGraphs`."""
        self._model, self._kv, self._state, self._workspace = model, kv, state, workspace
        self._tokens_out = tokens_out
        self._page_size, self._max_model_len = page_size, max_model_len
        self._shapes = captured_shapes(max_num_seqs, max_num_batched_tokens, mixed_chunk_tokens, prompt_step_tokens)
        self._crowds = crowds(max_num_seqs, max_num_batched_tokens)
        self._captured: dict[Shape, _Captured] = {}

    @property
    def num_shapes(self) -> int:
        return len(self._shapes)

    def run(self, chunks: Sequence[Chunk], staging: Staging) -> tuple[Tensor, list[int]]:
        """Compute the step: logits [S, vocab] until the next one, and which of the rows were sampled, in order."""
        decodes, prompts = split(chunks)
        exact = Shape(len(decodes), sum(len(chunk.tokens) for chunk in prompts), len(prompts))
        shape = choose_shape(self._captured, exact)
        if shape is not None:
            captured = self._captured[shape]
            staging.send(lay_out(chunks, shape), into=captured.inputs)
            captured.graph.replay()
            logits = captured.logits
        else:
            shape = exact
            inputs = _Inputs(*staging.send(lay_out(chunks, shape)))
            batch = self._batch(inputs, shape, chunks)
            logits = self._step(inputs, batch, any(chunk.samples for chunk in chunks))
        numbers = [*range(len(decodes)), *range(shape.decodes, shape.decodes + len(prompts))]
        return logits, [number for number, chunk in zip(numbers, chunks, strict=True) if chunk.samples]

    def run_scored(
        self, chunks: Sequence[Chunk], rows: Sequence[int], staging: Staging
    ) -> tuple[Tensor, list[int], Tensor]:
        """As `run`, op by op, and the hidden states of some of the step's tokens: [len(rows), hidden].

        Token j of chunk i is row j behind all tokens of the chunks before.
        """
        decodes, prompts = split(chunks)
        shape = Shape(len(decodes), sum(len(chunk.tokens) for chunk in prompts), len(prompts))
        *parts, index = staging.send([*lay_out(chunks, shape), rows])
        inputs = _Inputs(*parts)
        batch = self._batch(inputs, shape, chunks)
        hidden = self._model.forward(self._begin(inputs, batch), batch, self._kv)
        samples = any(chunk.samples for chunk in chunks)
        scored = hidden.index_select(0, index)
        logits = self._end(inputs, hidden.index_select(0, inputs.last_tokens), samples)
        return logits, [number for number, chunk in enumerate(chunks) if chunk.samples], scored

    def run_empty(self) -> None:
        """Every shape that is captured, op by op, with nothing but padding; and the crowds."""
        for shape in (*self._crowds, *self._shapes):
            _, inputs, batch = self._empty(shape)
            self._step(inputs, batch, True)

    def capture(self, pool: Any, captured: Callable[[], None]) -> None:
        """Capture all shapes into the memory pool, largest first; `captured` is called after each.

        Must be called in a stream of its own, with no sequence running.
        """
        for shape in self._crowds:
            _, inputs, batch = self._empty(shape)
            self._step(inputs, batch, True)
        for shape in sorted(self._shapes, key=lambda shape: -shape.tokens):
            buffer, inputs, batch = self._empty(shape)
            self._step(inputs, batch, True)  # allocates what outlives the step
            graph = torch.cuda.CUDAGraph()
            torch.cuda.current_stream().synchronize()
            graph.capture_begin(pool=pool)
            try:
                logits = self._step(inputs, batch, True)
            finally:
                graph.capture_end()
            self._captured[shape] = _Captured(graph, buffer, batch, logits)
            captured()

    def _empty(self, shape: Shape) -> tuple[Tensor, _Inputs, PagedBatch]:
        """A step of padding only: its inputs in one buffer, the same one by one, and as ops see it."""
        empty = lay_out((), shape)
        buffer = torch.zeros(Staging.size_of(empty), dtype=torch.int32, device=self._state.device)
        inputs = _Inputs(*Staging(self._state.device).send(empty, into=buffer))
        return buffer, inputs, self._batch(inputs, shape, None)

    def _batch(self, inputs: _Inputs, shape: Shape, chunks: Sequence[Chunk] | None) -> PagedBatch:
        """The step as ops see it; without chunks, as one whose lengths only the device knows."""
        even = shape.tokens + shape.tokens % 2  # both rows aligned to 16 bytes: one compiled kernel for any number
        positions, slots = torch.empty(2, even, dtype=torch.int64, device=self._state.device)[:, : shape.tokens]
        return PagedBatch(
            query_lens=tuple(len(chunk.tokens) for chunk in chunks or ()),
            context_lens=tuple(chunk.context for chunk in chunks or ()),
            page_tables=self._state.tables,
            table_rows=inputs.table_rows,
            contexts=inputs.contexts,
            query_starts=inputs.query_starts,
            positions=positions,
            slots=slots,
            page_size=self._page_size,
            num_decodes=shape.decodes,
            max_context=max(chunk.context for chunk in chunks) if chunks else self._max_model_len,
        )

    def _step(self, inputs: _Inputs, batch: PagedBatch, samples: bool) -> Tensor:
        hidden = self._model.forward(self._begin(inputs, batch), batch, self._kv, inputs.last_tokens)
        return self._end(inputs, hidden, samples)

    def _begin(self, inputs: _Inputs, batch: PagedBatch) -> Tensor:
        """Fills the batch's positions and slots; the step's token ids, [T] int64."""
        state = self._state
        token_ids = torch.empty_like(batch.positions)
        begin_mixed(
            inputs.owners, inputs.given, inputs.rows, inputs.contexts, inputs.query_starts,
            state.lengths, state.last_tokens, state.tables, self._page_size, state.turn, len(self._tokens_out),
            token_ids=token_ids, positions=batch.positions, slots=batch.slots,
        )  # fmt: skip
        return token_ids

    def _end(self, inputs: _Inputs, hidden: Tensor, samples: bool) -> Tensor:
        """From the hidden states of each sequence's last token [S, hidden]: the logits that `run` gives."""
        if not samples:
            return hidden
        state, logits = self._state, self._model.logits(hidden)
        sample(
            logits, inputs.sample_slots, inputs.contexts, state.columns, self._workspace,
            out=self._tokens_out, turn=state.turn,
        )  # fmt: skip
        return logits
