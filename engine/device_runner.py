"""Runs step plans on a CUDA device, a step ahead of their results: the `Executor` for one GPU.

A step in which every sequence decodes one token is one graph replay (engine/decode_graphs.py), sampling included; so
are steps with short prompts, others are launched op by op (engine/mixed_steps.py). The host only sends what changed
(engine/batch_state.py): tokens that the device sampled stay there, and a step's last kernel leaves them in host memory,
too, for whoever asks for the step's result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.common.messages import TokenLogprobs
from penstock.engine.batch_state import BatchState, Staging
from penstock.engine.decode_graphs import DecodeGraphs
from penstock.engine.kv_pool import KVPool
from penstock.engine.mixed_steps import MAX_PROMPTS, Chunk, MixedSteps
from penstock.engine.plan import (
    PromptScores,
    SampledTokens,
    SequenceStart,
    SequenceWork,
    StepHandle,
    StepPlan,
    StepResult,
    scored_positions,
)
from penstock.kernels.logprobs import token_logprobs
from penstock.kernels.sample import SampleWorkspace
from penstock.models.decoder import CausalLM

RUN_AHEAD = 1
_SCORED_AT_ONCE = 64  # prompt tokens: their logits are as many rows of the vocabulary


@dataclass
class _Sequence:
    """A running sequence: its slot, and what the host still knows that the device does not."""

    slot: int
    tokens: Sequence[int]  # those known when it started; what was sampled since is on the device
    num_pages: int
    logprobs: int | None
    prompt_len: int = 0
    prompt_logprobs: int | None = None  # its prompt is scored


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


@dataclass(frozen=True)
class _PromptPart:
    """Scores of prompt tokens of one sequence, from position `start` on."""

    key: str
    start: int
    logprobs: _Logprobs

    def read(self) -> PromptScores:
        return PromptScores(self.key, self.start, tuple(self.logprobs.read().values()))


class Event:
    """Marks a point in the device's stream; on CPU everything has happened already."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    def query(self) -> bool:
        """Whether it has been passed."""
        return self._event is None or bool(self._event.query())

    def synchronize(self) -> None:
        """Wait until it has been passed; in a thread that works with the device."""
        if self._event is not None:
            self._event.synchronize()

    def wait(self) -> None:
        """The same in any thread: in a new one CUDA would open a context on the first device, and take memory there."""
        if self._event is not None:
            with torch.cuda.device(self._device):
                self._event.synchronize()


class _Submitted:
    """A step on its way."""

    def __init__(
        self,
        step: int,
        keys: list[str],
        rows: Sequence[int],
        tokens: Tensor,
        arrived: Event,
        logprobs: _Logprobs | None,
        prompts: Sequence[_PromptPart],
    ) -> None:
        self._step, self._keys, self._rows, self._tokens = step, keys, rows, tokens
        self._arrived, self._logprobs, self._prompts = arrived, logprobs, prompts

    def done(self) -> bool:
        return self._arrived.query()

    def wait(self) -> None:
        self._arrived.wait()

    def result(self) -> StepResult:
        """Wait for the step's tokens. Raises what the device reports, whichever earlier step caused it."""
        self._arrived.synchronize()
        tokens = self._tokens.tolist()
        pairs = zip(self._keys, self._rows, strict=True)
        prompts = tuple([part.read() for part in self._prompts])
        if self._logprobs is None:
            return StepResult(self._step, tuple([SampledTokens(key, (tokens[row],)) for key, row in pairs]), prompts)
        found = self._logprobs.read()
        return StepResult(
            self._step,
            tuple([SampledTokens(key, (tokens[row],), (found[row],) if row in found else None) for key, row in pairs]),
            prompts,
        )


class DeviceRunner:
    """One model, one pool, one GPU. With `interpret_ops` set (kernels/launch.py) it also runs on CPU, for tests."""

    run_ahead = RUN_AHEAD

    def __init__(
        self,
        model: CausalLM,
        pool: KVPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        mixed_chunk_tokens: int = 0,
        prompt_step_tokens: int = 0,
    ) -> None:
        """mixed_chunk_tokens, prompt_step_tokens: as in `captured_shapes`."""
        self.model = model
        self.pool = pool
        device = pool.device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._page_size = pool.layout.page_size
        self._vocab_size = model.spec.vocab_size
        self._state = BatchState(max_num_seqs, -(-max_model_len // self._page_size), self._vocab_size, device)
        rows = max_num_seqs + MAX_PROMPTS
        workspace = SampleWorkspace.allocate(rows, self._vocab_size, device)
        self._sequences: dict[str, _Sequence] = {}
        self._free = list(range(max_num_seqs))[::-1]
        self._decoding: list[str] = []  # the sequences that the state's rows are
        buffers = RUN_AHEAD + 2
        self._stagings = [Staging(device) for _ in range(buffers)]
        self._layouts = [Staging(device) for _ in range(buffers)]
        self._masks = [Staging(device) for _ in range(buffers)]
        self._tokens_out = torch.zeros(buffers, rows, dtype=torch.int64, pin_memory=self._cuda)
        self._events = [Event(device) for _ in range(buffers)]
        self._turn = 0  # which of the buffers a step uses; the device counts along (BatchState.turn)
        self._num_with_logprobs = 0
        shared = (model, pool.layers(), self._state, workspace, self._tokens_out, self._page_size, max_num_seqs)
        self._decode_steps = DecodeGraphs(*shared, max_model_len)
        usual = (mixed_chunk_tokens, prompt_step_tokens)
        self._mixed_steps = MixedSteps(*shared, max_num_batched_tokens, max_model_len, *usual)
        if self._stream is not None:  # weights, pages and state are still being filled in another stream
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> StepHandle:
        """Send the step to the device. Raises what a launch raises; the sequences' state is then undefined."""
        try:
            with torch.cuda.stream(self._stream):
                return self._submit(plan)
        except BaseException:
            self._state.set_turn(self._turn)  # the device may have come so far or not
            raise

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._sequences.clear()
        self.pool.close()

    @torch.inference_mode()
    def run_empty(self) -> None:
        """Every step that `capture` captures, op by op; before the first sequence."""
        with torch.cuda.stream(self._stream):
            self._mixed_steps.run_empty()
            self._decode_steps.run_empty()

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile the steps of common shapes and capture them as graphs; `progress` gets (done, in all)."""
        if self._stream is None:
            return
        gc.collect()  # nothing of a runner before this one may be freed during a capture
        done, total = 0, self._mixed_steps.num_shapes + self._decode_steps.num_sizes

        def captured() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        with torch.cuda.stream(self._stream):
            self._state.set_rows([])  # what is run to compile it must not go on with sequences
            self._decoding = []
            self._apply_changes()
            pool = torch.cuda.graph_pool_handle()
            self._mixed_steps.capture(pool, captured)
            self._decode_steps.capture(pool, captured)
        self._state.set_turn(self._turn)
        self._stream.synchronize()

    # ------------------------------------------------------------ one step

    def _submit(self, plan: StepPlan) -> StepHandle:
        self._turn = (self._turn + 1) % len(self._stagings)
        self._events[self._turn].synchronize()  # has passed, unless steps were given up unread
        if plan.ended:
            self._decoding = []  # the same keys may come back in other slots
        for key in plan.ended:
            ended = self._sequences.pop(key, None)
            if ended is not None:
                self._free.append(ended.slot)
                self._num_with_logprobs -= ended.logprobs is not None
        for start in plan.started:
            self._start(start)
        masks = [(self._sequences[item.key].slot, item.mask) for item in plan.work if item.mask is not None]
        if masks:
            self._state.restrict(masks, self._masks[self._turn])
        decodes = self._note_pages(plan.work)
        return self._decode(plan) if decodes else self._mixed(plan)

    def _start(self, start: SequenceStart) -> None:
        slot = self._free.pop()
        scored = start.sampling.prompt_logprobs if start.scores_prompt else None
        self._sequences[start.key] = _Sequence(slot, start.tokens, 0, start.sampling.logprobs, start.prompt_len, scored)
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
        self._apply_changes()
        return self._hand_over(plan.step, keys, self._decode_steps.run(len(keys)), range(len(keys)))

    def _mixed(self, plan: StepPlan) -> StepHandle:
        """Prompt chunks, and decodes (which the scheduler puts first) beside them."""
        chunks = []
        for item in plan.work:
            sequence = self._sequences[item.key]
            tokens: Sequence[int] = (-1,)  # the one that the device sampled
            if item.start < len(sequence.tokens):
                tokens = sequence.tokens[item.start : item.start + item.num_tokens]
            chunks.append(Chunk(sequence.slot, tokens, item.start + item.num_tokens, item.samples))
        scored = self._scored(plan.work)
        rows = [row for _, positions, first_row in scored for row in range(first_row, first_row + len(positions))]
        prompts: list[_PromptPart] = []
        self._apply_changes()
        if rows:
            logits, sampled, hidden = self._mixed_steps.run_scored(chunks, rows, self._layouts[self._turn])
            prompts = self._score(scored, hidden)
        else:
            logits, sampled = self._mixed_steps.run(chunks, self._layouts[self._turn])
        keys = [item.key for item in plan.work if item.samples]
        return self._hand_over(plan.step, keys, logits, sampled, prompts)

    def _scored(self, work: Sequence[SequenceWork]) -> list[tuple[str, range, int]]:
        """(key, positions whose next token is scored, the step's row of the first) of sequences that ask for it."""
        found = []
        row = 0
        for item in work:
            sequence = self._sequences[item.key]
            if sequence.prompt_logprobs is not None and (positions := scored_positions(item, sequence.prompt_len)):
                found.append((item.key, positions, row))
            row += item.num_tokens
        return found

    def _score(self, scored: Sequence[tuple[str, range, int]], hidden: Tensor) -> list[_PromptPart]:
        """hidden: `[positions of all, hidden]`. A few rows at a time, whose logits find room beside any step's."""
        parts = []
        begin = 0
        for key, positions, _ in scored:
            sequence = self._sequences[key]
            top = min(sequence.prompt_logprobs or 0, self._vocab_size)
            for at in range(0, len(positions), _SCORED_AT_ONCE):
                part = positions[at : at + _SCORED_AT_ONCE]
                logits = self.model.logits(hidden[begin : begin + len(part)])
                targets = self._send(sequence.tokens[part.start + 1 : part.stop + 1])
                found = self._to_host(token_logprobs(logits, targets, top))
                parts.append(_PromptPart(key, part.start + 1, _Logprobs([*range(len(part))], [top] * len(part), found)))
                begin += len(part)
        return parts

    def _send(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, pin_memory=self._cuda).to(self.pool.device, non_blocking=True)

    def _to_host(self, found: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Copies in pinned memory, there with the step's event."""
        chosen, ranks, ids, values = (
            torch.empty_like(tensor, device="cpu", pin_memory=self._cuda).copy_(tensor, non_blocking=True)
            for tensor in found
        )
        return chosen, ranks, ids, values

    def _apply_changes(self) -> None:
        addresses, values = self._state.take_changes()
        if addresses:
            self._state.apply(self._stagings[self._turn].show([*addresses, *values]), len(addresses))

    def _hand_over(
        self,
        step: int,
        keys: list[str],
        logits: Tensor,
        sampled: Sequence[int],
        prompts: Sequence[_PromptPart] = (),
    ) -> StepHandle:
        """The step's handle; tokens and logits of `keys` are the rows `sampled`."""
        used = sampled[-1] + 1 if sampled else 0
        logprobs = None
        if self._num_with_logprobs:
            asked = [
                (row, sequence.slot, sequence.logprobs)
                for row, key in zip(sampled, keys, strict=True)
                if (sequence := self._sequences[key]).logprobs is not None
            ]
            logprobs = self._logprobs(asked, logits) if asked else None
        # A new one: somebody may still be about to wait for the last one of this turn.
        event = self._events[self._turn] = Event(self.pool.device)
        event.record()
        return _Submitted(step, keys, sampled, self._tokens_out[self._turn, :used], event, logprobs, prompts)

    def _logprobs(self, asked: list[tuple[int, int, int]], logits: Tensor) -> _Logprobs:
        """asked: (row, slot, top)."""
        rows, slots, tops = (list(numbers) for numbers in zip(*asked, strict=True))
        index, slot_index = self._send([*rows, *slots]).view(2, -1)
        tokens = self._state.last_tokens[slot_index].long()
        found = token_logprobs(logits[index], tokens, min(max(tops), self._vocab_size))
        return _Logprobs(rows, tops, self._to_host(found))
