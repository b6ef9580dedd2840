"""From logits to tokens on the device, for every row of a batch at once, without a sort; fit for a CUDA graph.

engine/sampler.py is the same for the CPU and says what is computed: bias, bans, min_tokens, penalties, then greedy,
or temperature, min-p, top-k, top-p and the largest logit plus seeded Gumbel noise. Here what it must know of a sequence
lies on the device, an entry of `SamplingColumns` a slot; the host writes a slot when a sequence joins, and never again:
`sample` keeps the last token that it drew, counts all, and notes which ones banned words forbid next. Only the masks of
outputs that have a form come with every step (kernels/token_mask.py). Rows do not influence each other, and a row draws
the same in every batch.

Against the reference: equal, but for rounding. Its top-p adds sorted float32 probabilities, the kernels add integers
of 2^-40 of the likeliest token, which is closer to the true sum; a token whose place in the sum is within about 1e-6 of
top_p may be kept by one and dropped by the other. Exponentials and logarithms differ in the last bits between devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from penstock.kernels.filters import NEVER, filter_min_p, filter_top_k_top_p
from penstock.kernels.launch import num_multiprocessors, pdl_options, use_triton
from penstock.kernels.philox import exponential_noise
from penstock.kernels.sample_finish import finish_kernel
from penstock.kernels.sample_kernels import count_kernel, gather_kernel, stream_kernel
from penstock.kernels.sample_row import (
    BAN_LENGTH,
    BAN_WORDS,
    BANNED,
    BINS,
    COUNT_MASK,
    ENDS,
    IN_PROMPT,
    MASKED,
    USES_BANS,
    USES_BIAS,
    USES_STATE,
)

__all__ = [
    "BANNED",
    "BAN_LENGTH",
    "BAN_WORDS",
    "COUNT_MASK",
    "ENDS",
    "IN_PROMPT",
    "MASKED",
    "USES_BANS",
    "USES_BIAS",
    "USES_STATE",
    "SampleWorkspace",
    "SamplingColumns",
    "sample",
    "sample_reference",
    "sample_triton",
]

_GREEDY_BELOW = 1e-5  # as common/sampling.py, which kernels may not import
_MIN_TEMPERATURE = 0.01
_PURPOSE_SAMPLE = 0
_MAX_SPLITS = 128  # a power of 2


@dataclass(frozen=True)
class SamplingColumns:
    """What to do for each of N slots; a slot is a sequence's place in the batch state on the device."""

    temperature: Tensor  # [N] float32; 0: greedy
    top_k: Tensor  # [N] int32; 0: off
    top_p: Tensor  # [N] float32; 1: off
    min_p: Tensor  # [N] float32; 0: off
    repetition: Tensor  # [N] float32; 1: off
    frequency: Tensor  # [N] float32; 0: off
    presence: Tensor  # [N] float32; 0: off
    seeds: Tensor  # [N] int64: engine.sampler.noise_seed
    min_position: Tensor  # [N] int32: tokens flagged ENDS are forbidden at positions below
    uses_tokens: Tensor  # [N] int32; 0: none of what follows is read. USES_STATE, plus USES_BIAS, plus USES_BANS
    token_state: (
        Tensor  # [N, vocab] int32: times the token was output (COUNT_MASK), IN_PROMPT, ENDS; now BANNED, MASKED
    )
    bias: Tensor  # [N, vocab] float32: added first; -inf: never to be drawn
    ban_length: Tensor  # [N] int32: tokens of the longest banned word
    ban_words: Tensor  # [N, BAN_LENGTH, BAN_WORDS] int32: words' tokens from the last one back, -1 where there is none
    recent: Tensor  # [N, BAN_LENGTH] int32: the output token of position p at p % BAN_LENGTH, -1: none yet
    last_tokens: Tensor  # [N] int32: written, never read: the token drawn last

    @classmethod
    def allocate(cls, slots: int, vocab: int, device: torch.device | str) -> SamplingColumns:
        """Slots of greedy sequences without penalties, bias or bans."""

        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((slots,), value, dtype=dtype, device=device)

        return cls(
            temperature=column(0.0, torch.float32),
            top_k=column(0, torch.int32),
            top_p=column(1.0, torch.float32),
            min_p=column(0.0, torch.float32),
            repetition=column(1.0, torch.float32),
            frequency=column(0.0, torch.float32),
            presence=column(0.0, torch.float32),
            seeds=column(0, torch.int64),
            min_position=column(0, torch.int32),
            uses_tokens=column(0, torch.int32),
            ban_length=column(0, torch.int32),
            last_tokens=column(0, torch.int32),
            **cls.allocate_tables(slots, vocab, device),
        )

    @staticmethod
    def allocate_tables(slots: int, vocab: int, device: torch.device | str) -> dict[str, Tensor]:
        """What has more than one number a slot; read only where `uses_tokens` says so."""
        return {
            "token_state": torch.zeros(slots, vocab, dtype=torch.int32, device=device),
            "bias": torch.zeros(slots, vocab, dtype=torch.float32, device=device),
            "ban_words": torch.full((slots, BAN_LENGTH, BAN_WORDS), -1, dtype=torch.int32, device=device),
            "recent": torch.full((slots, BAN_LENGTH), -1, dtype=torch.int32, device=device),
        }


@dataclass(frozen=True)
class SampleWorkspace:
    """Scratch memory of `sample`, allocated once; what it holds between calls does not matter."""

    best: Tensor  # [rows, splits] float32: each split's best value
    best_id: Tensor  # [rows, splits] int32
    counts: Tensor  # [rows, BINS] int32: tokens by distance from the maximum
    total: Tensor  # [rows, splits] int64: mass that min-p leaves
    above: Tensor  # [rows, splits] int64: mass above the list
    num_above: Tensor  # [rows] int32
    listed: Tensor  # [rows] int32: tokens of the list, also those it had no room for
    list_z: Tensor  # [rows, capacity] float32
    list_id: Tensor  # [rows, capacity] int32

    @classmethod
    def allocate(
        cls, max_rows: int, vocab: int, device: torch.device | str, *, capacity: int | None = None
    ) -> SampleWorkspace:
        """For batches of up to max_rows rows.

        The list's default capacity is an 8th to a 4th of the vocabulary: logits of a standard normal distribution have
        up to 10 % of their tokens in the bins where top-p cuts. Flatter rows are slower, not wrong.
        """
        capacity = capacity or max(1024, triton.next_power_of_2(-(-vocab // 8)))

        def scratch(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(max_rows, width, dtype=dtype, device=device)

        return cls(
            best=scratch(_MAX_SPLITS, torch.float32),
            best_id=scratch(_MAX_SPLITS, torch.int32),
            counts=scratch(BINS, torch.int32),
            total=scratch(_MAX_SPLITS, torch.int64),
            above=scratch(_MAX_SPLITS, torch.int64),
            num_above=scratch(1, torch.int32),
            listed=scratch(1, torch.int32),
            list_z=scratch(capacity, torch.float32),
            list_id=scratch(capacity, torch.int32),
        )


def sample(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    columns: SamplingColumns,
    workspace: SampleWorkspace,
    *,
    out: Tensor | None = None,
    turn: Tensor | None = None,
) -> Tensor:
    """The next token of each row, `[B]` int64; its slot's last one, and counted in `token_state` of slots that use it.

    Args:
        logits: `[B, vocab]` bfloat16, float16 or float32; rows may have any stride. Not changed.
        slots: `[B]` int32, each slot once; -1: padding, whose result is 0.
        positions: `[B]` int32, position of the token to be drawn: the number of tokens known.
        out: where to write the tokens, also in pinned memory of the host; a new tensor without. Returned as it is.
        turn: `[1]` int32; with it, out is `[turns, >= B]`, and the tokens are its row turn[0].

    Raises:
        ValueError: more rows than the workspace or out has room for.
    """
    if use_triton(logits):
        return sample_triton(logits, slots, positions, columns, workspace, out=out, turn=turn)
    tokens = sample_reference(logits, slots, positions, columns)
    if out is None:
        return tokens
    (out if turn is None else out[int(turn)])[: len(tokens)] = tokens
    return out


def sample_reference(logits: Tensor, slots: Tensor, positions: Tensor, columns: SamplingColumns) -> Tensor:
    """`sample` in plain PyTorch."""
    vocab = logits.shape[-1]
    index = slots.clamp(min=0).long()

    def column(values: Tensor) -> Tensor:
        return values[index][:, None]

    uses = column(columns.uses_tokens)
    uses_tokens = uses != 0
    x = logits.float() + torch.where((uses & USES_BIAS) != 0, columns.bias[index], 0.0)
    state = torch.where(uses_tokens, columns.token_state[index], 0)
    output = state & COUNT_MASK
    repetition = torch.where((state & (COUNT_MASK | IN_PROMPT)) != 0, column(columns.repetition), 1.0)
    x = torch.where(x > 0, x / repetition, x * repetition)
    x = torch.where(output > 0, x - (column(columns.frequency) * output + column(columns.presence)), x)
    banned = ((state & ENDS) != 0) & (positions[:, None] < column(columns.min_position))
    x = x.masked_fill(banned | ((state & BANNED) != 0) | (state < 0), NEVER)

    temperature = columns.temperature[index]
    z = filter_min_p(x / temperature.clamp(min=_MIN_TEMPERATURE)[:, None], columns.min_p[index])
    top_k = columns.top_k[index].long()
    z = filter_top_k_top_p(z, torch.where(top_k > 0, top_k, vocab), columns.top_p[index])
    noise = exponential_noise(columns.seeds[index], positions.long(), _PURPOSE_SAMPLE, vocab)
    drawn = (z - noise.log()).argmax(dim=-1)
    tokens = torch.where(temperature < _GREEDY_BELOW, x.argmax(dim=-1), drawn)
    tokens = torch.where(slots < 0, 0, tokens)
    columns.last_tokens[index[slots >= 0]] = tokens[slots >= 0].int()
    counted = uses_tokens[:, 0] & (slots >= 0)
    columns.token_state[index[counted], tokens[counted]] += 1
    for row in ((uses[:, 0] & USES_BANS) != 0).logical_and(slots >= 0).nonzero()[:, 0].tolist():
        _ban_next_reference(columns, int(slots[row]), int(positions[row]), int(tokens[row]))
    return tokens


def _ban_next_reference(columns: SamplingColumns, slot: int, position: int, token: int) -> None:
    """`sample_row.ban_next` in plain PyTorch."""
    state, words, recent = columns.token_state[slot], columns.ban_words[slot], columns.recent[slot]
    recent[position % BAN_LENGTH] = token
    last = words[0][words[0] >= 0].long()
    before = words[1 : int(columns.ban_length[slot]), words[0] >= 0]  # [longest - 1, words]
    past = recent[(position - torch.arange(len(before), device=recent.device)) % BAN_LENGTH]
    completes = ((before < 0) | (before == past[:, None])).all(dim=0)
    state[last] &= ~BANNED
    state[last[completes]] |= BANNED


def _tiling(rows: int, vocab: int, tile: int, multiprocessors: int) -> tuple[int, int]:
    """(splits of a row, tiles of a split): some 16 small programs a multiprocessor, if there is work for them."""
    tiles = -(-vocab // tile)
    splits = min(tiles, _MAX_SPLITS, max(1, 16 * multiprocessors // rows))
    each = -(-tiles // splits)
    return -(-tiles // each), each


def sample_triton(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    columns: SamplingColumns,
    workspace: SampleWorkspace,
    *,
    out: Tensor | None = None,
    turn: Tensor | None = None,
    tile: int = 1024,
    finish_tile: int = 1024,
) -> Tensor:
    """`sample` by Triton kernels. Tiles are powers of 2, from 4 up: how many tokens a program looks at together."""
    rows, vocab = logits.shape
    c, w = columns, workspace
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    room = min(len(w.best), tokens.shape[-1])
    if rows > room:
        raise ValueError(f"{rows} rows, there is room for {room}")
    splits, tiles = _tiling(rows, vocab, tile, num_multiprocessors(logits.device))
    capacity = w.list_z.shape[1]
    options = pdl_options(logits)
    stride, state_stride = logits.stride(0), c.token_state.stride(0)
    filter_columns = (c.temperature, c.top_k, c.top_p, c.min_p)
    penalty_columns = (c.repetition, c.frequency, c.presence)
    token_columns = (c.min_position, c.uses_tokens, c.token_state, c.bias, state_stride)
    row = (logits, stride, slots, positions, *filter_columns, *penalty_columns)
    stream_kernel[(rows, splits)](
        *row, c.seeds, *token_columns, w.best, w.best_id, w.counts, w.listed, vocab, tiles,
        SPLITS=_MAX_SPLITS, TILE=tile, num_warps=4, **options,
    )  # fmt: skip
    count_kernel[(rows, splits)](
        *row, *token_columns, w.best, w.counts, w.total, vocab, splits, tiles,
        SPLITS=_MAX_SPLITS, TILE=tile, num_warps=4, **options,
    )  # fmt: skip
    gather_kernel[(rows, splits)](
        *row, *token_columns, w.best, w.counts, w.total, w.above, w.num_above, w.listed, w.list_z, w.list_id,
        vocab, splits, tiles, SPLITS=_MAX_SPLITS, CAPACITY=capacity, TILE=tile, num_warps=4, **options,
    )  # fmt: skip
    finish_kernel[(rows,)](
        *row, c.seeds, *token_columns, w.best, w.best_id, w.counts, w.total, w.above, w.num_above, w.listed, w.list_z,
        w.list_id, tokens, turn, tokens.stride(0), c.last_tokens, c.ban_length, c.ban_words, c.recent, vocab, splits,
        SPLITS=_MAX_SPLITS, CAPACITY=capacity, TILE=finish_tile, IN_TURN=turn is not None, num_warps=8, **options,
    )  # fmt: skip
    return tokens
