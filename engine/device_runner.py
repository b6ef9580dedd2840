"""Runs step plans on a CUDA device, a step ahead of their results: the `Executor` for one GPU.

A step in which every sequence decodes one token is one graph replay (engine/decode_graphs.py), sampling included; other
steps are launched op by op. Either way the host only sends what changed (engine/batch_state.py): tokens that the device
sampled stay there, and are read when the handle is asked for its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.common.messages import TokenLogprobs
from penstock.engine.batch_state import BatchState, Staging
from penstock.engine.decode_graphs import DecodeGraphs
from penstock.engine.kv_pool import KVPool
from penstock.engine.plan import SampledTokens, SequenceStart, SequenceWork, StepHandle, StepPlan, StepResult
from penstock.kernels.logprobs import token_logprobs
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.sample import SampleWorkspace, sample
from penstock.kernels.step_state import begin_mixed, end_step
from penstock.models.decoder import CausalLM

RUN_AHEAD = 1


@dataclass
class _Sequence:
    """A running sequence: its slot, and what the host still knows that the device does not."""

    slot: int
    tokens: Sequence[int]  # those known when it started; what was sampled since is on the device
    num_pages: int
    logprobs: int | None


@dataclass(frozen=True)
class _Logprobs:
    """Logprobs of one step, for `rows` of its samples; they arrive in host memory with its tokens."""

    rows: list[int]
    tops: list[int]
    values: tuple[Tensor, Tensor, Tensor, Tensor]  # logprob, rank, top ids, top logprobs

    def read(self) -> dict[int, TokenLogprobs]:
        chosen, ranks, ids, values = (tensor.tolist() for tensor in self.values)
        return {
            row: TokenLogprobs(chosen[i], ranks[i], ids[i][:top], values[i][:top])
            for i, (row, top) in enumerate(zip(self.rows, self.tops, strict=True))
        }


class Event:
    """Marks a point in the device's stream; on CPU everything has happened already."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    def synchronize(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class _Submitted:
    """A step on its way."""

    def __init__(self, step: int, keys: list[str], tokens: Tensor, arrived: Event, logprobs: _Logprobs | None) -> None:
        self._step, self._keys, self._tokens, self._arrived, self._logprobs = step, keys, tokens, arrived, logprobs

    def result(self) -> StepResult:
        """Wait for the step's tokens. Raises what the device reports, whichever earlier step caused it."""
        self._arrived.synchronize()
        tokens = self._tokens.tolist()
        if self._logprobs is None:
            return StepResult(
                self._step, tuple([SampledTokens(key, (token,)) for key, token in zip(self._keys, tokens, strict=True)])
            )
        found = self._logprobs.read()
        pairs = enumerate(zip(self._keys, tokens, strict=True))
        return StepResult(
            self._step,
            tuple(SampledTokens(key, (token,), (found[i],) if i in found else None) for i, (key, token) in pairs),
        )


class DeviceRunner:
    """One model, one pool, one GPU. With `interpret_ops` set (kernels/launch.py) it also runs on CPU, for tests."""

    run_ahead = RUN_AHEAD

    def __init__(self, model: CausalLM, pool: KVPool, *, max_num_seqs: int, max_model_len: int) -> None:
        self.model = model
        self.pool = pool
        device = pool.device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._kv = pool.layers()
        self._page_size = pool.layout.page_size
        self._vocab_size = model.spec.vocab_size
        self._state = BatchState(max_num_seqs, -(-max_model_len // self._page_size), self._vocab_size, device)
        self._workspace = SampleWorkspace.allocate(max_num_seqs, self._vocab_size, device)
        self._sequences: dict[str, _Sequence] = {}
        self._free = list(range(max_num_seqs))[::-1]
        self._decoding: list[str] = []  # the sequences that the state's rows are
        buffers = RUN_AHEAD + 2
        self._stagings = [Staging(device) for _ in range(buffers)]
        self._tokens_out = [torch.empty(max_num_seqs, dtype=torch.int64, pin_memory=self._cuda) for _ in range(buffers)]
        self._events = [Event(device) for _ in range(buffers)]
        self._turn = 0
        self._num_with_logprobs = 0
        self._decode_steps = DecodeGraphs(
            model, self._kv, self._state, self._workspace, self._page_size, max_num_seqs, max_model_len
        )

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> StepHandle:
        """Send the step to the device. Raises what a launch raises; the sequences' state is then undefined."""
        if self._stream is None:
            return self._submit(plan)
        with torch.cuda.stream(self._stream):
            return self._submit(plan)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._sequences.clear()
        self.pool.close()

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile the decode steps of all batch sizes, and capture them as graphs; `progress` gets (done, in all)."""
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._decode_steps.capture(progress)
            self._stream.synchronize()

    # ------------------------------------------------------------ one step

    def _submit(self, plan: StepPlan) -> StepHandle:
        self._turn = (self._turn + 1) % len(self._stagings)
        for key in plan.ended:
            ended = self._sequences.pop(key, None)
            if ended is not None:
                self._free.append(ended.slot)
                self._num_with_logprobs -= ended.logprobs is not None
        for start in plan.started:
            self._start(start)
        decodes = self._note_pages(plan.work)
        return self._decode(plan) if decodes else self._mixed(plan)

    def _start(self, start: SequenceStart) -> None:
        slot = self._free.pop()
        self._sequences[start.key] = _Sequence(slot, start.tokens, 0, start.sampling.logprobs)
        self._num_with_logprobs += start.sampling.logprobs is not None
        self._state.start(slot, start)

    def _note_pages(self, work: Sequence[SequenceWork]) -> bool:
        """Append new pages to the page tables; whether all that is to do is one sampled token a sequence."""
        decodes = True
        for item in work:
            if item.new_pages:
                sequence = self._sequences[item.key]
                self._state.set_pages(sequence.slot, sequence.num_pages, item.new_pages)
                sequence.num_pages += len(item.new_pages)
            if item.num_tokens != 1 or not item.samples:
                decodes = False
        return decodes

    def _decode(self, plan: StepPlan) -> StepHandle:
        keys = [item.key for item in plan.work]
        for item in plan.work:
            sequence = self._sequences[item.key]
            if sequence.tokens:
                if item.start < len(sequence.tokens):
                    self._state.set_last_token(sequence.slot, sequence.tokens[item.start], item.start)
                sequence.tokens = ()
        if keys != self._decoding:
            self._state.set_rows([self._sequences[key].slot for key in keys])
            self._decoding = keys
        addresses, values = self._state.take_changes()
        if addresses:
            self._state.apply(self._stagings[self._turn].send([[*addresses, *values]])[0], len(addresses))
        tokens, logits = self._decode_steps.run(len(keys))
        return self._hand_over(plan.step, keys, tokens, logits)

    def _mixed(self, plan: StepPlan) -> StepHandle:
        """Prompt chunks, and decodes (which the scheduler puts first) beside them, op by op."""
        state = self._state
        work = plan.work
        sequences = [self._sequences[item.key] for item in work]
        query_lens = [item.num_tokens for item in work]
        context_lens = [item.start + item.num_tokens for item in work]
        given: list[int] = []
        for item, sequence in zip(work, sequences, strict=True):
            if item.start < len(sequence.tokens):
                given.extend(sequence.tokens[item.start : item.start + item.num_tokens])
            else:
                given.append(-1)  # one token, which the device sampled
        sampling = [i for i, item in enumerate(work) if item.samples]
        sample_index = [-1] * len(work)
        for n, i in enumerate(sampling):
            sample_index[i] = n
        starts = np.zeros(len(work) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=starts[1:])
        addresses, values = state.take_changes()
        slots = [sequence.slot for sequence in sequences]
        changes, owners, given_ids, rows, contexts, query_starts, index, last_rows, sample_slots, draw_at = (
            self._stagings[self._turn].send(
                [
                    [*addresses, *values],
                    np.repeat(np.arange(len(work), dtype=np.int32), query_lens),
                    given,
                    slots,
                    context_lens,
                    starts,
                    sample_index,
                    starts[1:][sampling] - 1,
                    [slots[i] for i in sampling],
                    [context_lens[i] for i in sampling],
                ]
            )
        )
        if addresses:
            state.apply(changes, len(addresses))
        device, total = self.pool.device, len(given)
        token_ids, positions, kv_slots = torch.empty(3, total, dtype=torch.int64, device=device).unbind(0)
        begin_mixed(
            owners, given_ids, rows, contexts, query_starts, state.last_tokens, state.tables, self._page_size,
            token_ids=token_ids, positions=positions, slots=kv_slots,
        )  # fmt: skip
        batch = PagedBatch(
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            page_tables=state.tables,
            table_rows=rows,
            contexts=contexts,
            query_starts=query_starts,
            positions=positions,
            slots=kv_slots,
            page_size=self._page_size,
            num_decodes=next((i for i, query in enumerate(query_lens) if query > 1), len(query_lens)),
            max_context=max(context_lens),
        )
        hidden = self.model.forward(token_ids, batch, self._kv)
        if sampling:
            logits = self.model.logits(hidden.index_select(0, last_rows))
            tokens = sample(logits, sample_slots, draw_at, state.columns, self._workspace)
        else:
            logits, tokens = hidden, kv_slots[:0]
        end_step(rows, contexts, tokens, index, state.lengths, state.last_tokens)
        return self._hand_over(plan.step, [work[i].key for i in sampling], tokens, logits)

    def _hand_over(self, step: int, keys: list[str], tokens: Tensor, logits: Tensor) -> StepHandle:
        out = self._tokens_out[self._turn][: len(keys)]
        out.copy_(tokens[: len(keys)], non_blocking=True)
        logprobs = None
        if self._num_with_logprobs:
            asked = [(i, top) for i, key in enumerate(keys) if (top := self._sequences[key].logprobs) is not None]
            logprobs = self._logprobs(asked, tokens, logits) if asked else None
        event = self._events[self._turn]
        event.record()
        return _Submitted(step, keys, out, event, logprobs)

    def _logprobs(self, asked: list[tuple[int, int]], tokens: Tensor, logits: Tensor) -> _Logprobs:
        rows, tops = [i for i, _ in asked], [top for _, top in asked]
        index = torch.tensor(rows).to(self.pool.device)
        found = token_logprobs(logits[index], tokens[index], min(max(tops), self._vocab_size))
        chosen, ranks, ids, values = (
            torch.empty_like(tensor, device="cpu", pin_memory=self._cuda).copy_(tensor, non_blocking=True)
            for tensor in found
        )
        return _Logprobs(rows, tops, (chosen, ranks, ids, values))
