"""What the device knows of the running sequences, and how the host changes it.

Each running sequence has a slot. All that is kept for the slots is one int32 tensor, the state, seen through typed
views: page tables, lengths, last tokens, sampling parameters, and which slot each row of a decode batch is. The host
collects changes as (address, value) pairs; one launch applies those of a step, in the order of the device's stream. A
step that changes nothing sends nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.engine.plan import SequenceStart
from penstock.engine.sampler import noise_seed
from penstock.engine.token_rules import TokenRules
from penstock.kernels.sample import (
    BAN_LENGTH,
    BANNED,
    COUNT_MASK,
    ENDS,
    IN_PROMPT,
    USES_BANS,
    USES_BIAS,
    USES_STATE,
    SamplingColumns,
)
from penstock.kernels.step_state import apply_changes
from penstock.kernels.token_mask import set_masks

_FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
_INTS = ("top_k", "min_position", "uses_tokens", "ban_length")
_STAGING_INTS = 1 << 16


class BatchState:
    """State of up to `slots` sequences of up to `max_pages` pages each."""

    def __init__(self, slots: int, max_pages: int, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self.max_pages = max_pages
        self._begin: dict[str, int] = {}
        sizes = {"seeds": 2 * slots, "tables": slots * max_pages, "lengths": slots, "last_tokens": slots, "rows": slots}
        sizes |= {"turn": 1} | dict.fromkeys((*_FLOATS, *_INTS), slots)
        total = 0
        for name, size in sizes.items():  # seeds first: they are 64-bit
            self._begin[name] = total
            total += size + size % 2
        self._state = torch.zeros(total, dtype=torch.int32, device=device)

        def view(name: str, dtype: torch.dtype = torch.int32) -> Tensor:
            return self._state[self._begin[name] : self._begin[name] + sizes[name]].view(dtype)

        self.tables = view("tables").view(slots, max_pages)
        self.lengths = view("lengths")
        self.last_tokens = view("last_tokens")
        self.rows = view("rows").fill_(-1)
        self.turn = view("turn")
        self.columns = SamplingColumns(
            **{name: view(name, torch.float32) for name in _FLOATS},
            **{name: view(name) for name in _INTS},
            seeds=view("seeds", torch.int64),
            last_tokens=self.last_tokens,
            **SamplingColumns.allocate_tables(slots, vocab_size, device),
        )
        self._addresses: list[int] = []
        self._values: list[int] = []
        self._num_rows = 0

    # ------------------------------------------------------------ changes

    def set_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """The slot's page table continues with `pages` at index `first`."""
        begin = self._begin["tables"] + slot * self.max_pages + first
        self._addresses.extend(range(begin, begin + len(pages)))
        self._values.extend(pages)

    def set_last_token(self, slot: int, token: int, length: int) -> None:
        """The slot's next token to compute, which stands at position `length`."""
        self._addresses += (self._begin["last_tokens"] + slot, self._begin["lengths"] + slot)
        self._values += (token, length)

    def set_rows(self, slots: Sequence[int]) -> None:
        """Which slots the next decode batches consist of."""
        padding = max(0, self._num_rows - len(slots))
        begin = self._begin["rows"]
        self._addresses.extend(range(begin, begin + len(slots) + padding))
        self._values.extend(slots)
        self._values.extend([-1] * padding)
        self._num_rows = len(slots)

    def set_turn(self, turn: int) -> None:
        """The last step's turn; the next step has the one after it."""
        self._set("turn", 0, turn)

    def start(self, slot: int, sequence: SequenceStart) -> None:
        """A sequence takes the slot: its sampling parameters, and what penalties, bans and min_tokens have to know."""
        s = sequence.sampling
        ending = set(s.stop_token_ids) | (set() if s.ignore_eos else set(sequence.eos_token_ids))
        forbids = bool(s.min_tokens and ending)
        penalised = s.repetition_penalty != 1.0 or s.frequency_penalty != 0.0 or s.presence_penalty != 0.0
        values = {
            "temperature": 0.0 if s.greedy else s.effective_temperature,
            "top_p": s.top_p,
            "min_p": s.min_p,
            "repetition": s.repetition_penalty,
            "frequency": s.frequency_penalty,
            "presence": s.presence_penalty,
        }
        for name, value in values.items():
            self._set(name, slot, struct.unpack("<i", struct.pack("<f", value))[0])
        self._set("top_k", slot, max(0, min(s.top_k, 2**31 - 1)))
        self._set("min_position", slot, min(sequence.prompt_len + s.min_tokens, 2**31 - 1) if forbids else 0)
        rules = TokenRules.of(s)
        words = rules.words if rules is not None else ()
        restricted = rules is not None or s.structured_outputs is not None
        uses = USES_STATE if forbids or penalised or restricted else 0
        uses += USES_BIAS if rules is not None and rules.has_bias else 0
        uses += USES_BANS if words else 0
        self._set("uses_tokens", slot, uses)
        self._set("ban_length", slot, max(map(len, words), default=0))
        low, high = struct.unpack("<ii", struct.pack("<q", noise_seed(s.seed, sequence.choice)))
        self._set("seeds", 2 * slot, low)
        self._set("seeds", 2 * slot + 1, high)
        if uses:
            self._start_tokens(slot, sequence, ending)
        if rules is not None:
            self._start_rules(slot, sequence, rules)

    def _set(self, name: str, index: int, value: int) -> None:
        self._addresses.append(self._begin[name] + index)
        self._values.append(value)

    def _start_tokens(self, slot: int, sequence: SequenceStart, ending: set[int]) -> None:
        row = self.columns.token_state[slot].zero_()
        tokens = self._send(sequence.tokens)
        output = tokens[sequence.prompt_len :]
        row.scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32)).clamp_(max=COUNT_MASK)
        row[tokens[: sequence.prompt_len]] |= IN_PROMPT
        known = [token for token in ending if token < len(row)]
        if known:
            row[self._send(known)] |= ENDS

    def _start_rules(self, slot: int, sequence: SequenceStart, rules: TokenRules) -> None:
        """Fill what only slots with such rules read, all in the order of the stream."""
        vocab = self.columns.bias.shape[1]
        if rules.has_bias:
            row = rules.bias_row(vocab)
            row = row.pin_memory() if self.device.type == "cuda" else row
            self.columns.bias[slot].copy_(row, non_blocking=True)
        words = [word for word in rules.words if max(word) < vocab]
        if not words:
            return
        length = max(map(len, words))
        table = self.columns.ban_words[slot].fill_(-1)
        backwards = [[word[-1 - back] if back < len(word) else -1 for word in words] for back in range(length)]
        table[:length, : len(words)] = self._send([token for row in backwards for token in row]).view(length, -1).int()
        recent = self.columns.recent[slot].fill_(-1)
        known = len(sequence.tokens)
        last = range(max(sequence.prompt_len, known - BAN_LENGTH + 1), known)
        if last:
            output = self._send(sequence.tokens[last.start : known])
            recent[self._send([position % BAN_LENGTH for position in last])] = output.int()
        completing = [t for t in rules.completing(sequence.tokens, sequence.prompt_len) if t < vocab]
        if completing:
            self.columns.token_state[slot][self._send(completing)] |= BANNED

    def _send(self, numbers: Sequence[int]) -> Tensor:
        """int64 on the device, without waiting for the steps before."""
        pinned = self.device.type == "cuda"
        return torch.tensor(numbers, dtype=torch.int64, pin_memory=pinned).to(self.device, non_blocking=True)

    def restrict(self, masks: Sequence[tuple[int, bytes]], staging: Staging) -> None:
        """Let only the tokens in these masks be sampled for their slots, from the next step on."""
        vocab = self.columns.token_state.shape[1]
        words = -(-vocab // 32)
        arrays = [np.frombuffer(mask, dtype=np.int32)[:words] for _, mask in masks]
        slots, packed = staging.send([[slot for slot, _ in masks], np.concatenate(arrays)])
        set_masks(self.columns.token_state, slots, packed.view(len(masks), words))

    def take_changes(self) -> tuple[list[int], list[int]]:
        """Addresses and values since the last call; of an address that was set twice only the last value counts."""
        addresses, values = self._addresses, self._values
        self._addresses, self._values = [], []
        if len(set(addresses)) < len(addresses):
            last = dict(zip(addresses, values, strict=True))
            addresses, values = list(last), list(last.values())
        return addresses, values

    def apply(self, changes: Tensor, count: int) -> None:
        """Apply what `take_changes` gave: int32 [2 * count], the addresses first, where the device can read it."""
        apply_changes(self._state, changes, count)


class Staging:
    """A step's integers on their way to the device: one pinned buffer, and one there.

    A buffer may be used again when the step that used it has been read; the runner keeps as many as can be open.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allocate(_STAGING_INTS)

    def _allocate(self, size: int) -> None:
        pinned = self._device.type == "cuda"
        self._host = torch.empty(size, dtype=torch.int32, pin_memory=pinned)
        self._array = self._host.numpy()
        self._on_device = torch.empty(size, dtype=torch.int32, device=self._device)

    @staticmethod
    def size_of(parts: Sequence[Sequence[int] | np.ndarray]) -> int:
        """Integers that `send` copies."""
        return sum(-(-len(part) // 4) * 4 for part in parts)

    def show(self, part: Sequence[int]) -> Tensor:
        """The part in pinned memory, int32, for a kernel that reads it from there: for few numbers, and once."""
        self._pack([part])
        return self._host[: len(part)]

    def send(self, parts: Sequence[Sequence[int] | np.ndarray], into: Tensor | None = None) -> list[Tensor]:
        """The parts on the device, each int32 and aligned to 16 bytes in our own buffer or at the start of `into`.

        All arrive in one copy, in the order of the current stream.
        """
        begins, total = self._pack(parts)
        target = self._on_device if into is None else into
        target[:total].copy_(self._host[:total], non_blocking=True)
        return [target[begin : begin + len(part)] for begin, part in zip(begins, parts, strict=True)]

    def _pack(self, parts: Sequence[Sequence[int] | np.ndarray]) -> tuple[list[int], int]:
        """Put the parts into the pinned buffer: where each begins, and how many integers that are in all."""
        total = self.size_of(parts)
        if total > len(self._array):
            self._allocate(max(total, 2 * len(self._array)))
        begins, begin = [], 0
        for part in parts:
            self._array[begin : begin + len(part)] = part
            begins.append(begin)
            begin += -(-len(part) // 4) * 4
        return begins, total
