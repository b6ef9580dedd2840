"""Tokens that an output's form allows next, as masks of a bit a token: on logits, or in the state of device slots.

Word w of a mask holds tokens 32 w to 32 w + 31, the lowest in its lowest bit. For the CPU's sampler `forbid_others`
changes a row of logits. On a device masks become flags of `SamplingColumns.token_state`, which the sampling kernels
read anyway: logits stay as they are, for logprobs, and a captured step needs to know nothing of masks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.filters import NEVER
from penstock.kernels.launch import use_triton
from penstock.kernels.sample_row import MASKED

_TILE = 1024
_FLAG = tl.constexpr(MASKED)
_OTHERS = tl.constexpr(~MASKED)


def unpacked(masks: Tensor, vocab: int) -> Tensor:
    """masks: `[B, words]` int32. Which tokens are allowed, `[B, vocab]` bool."""
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    return (masks[:, :, None] >> bits & 1).bool().flatten(1)[:, :vocab]


def forbid_others(logits: Tensor, mask: Tensor) -> None:
    """Logits of tokens that the mask lacks become -inf, in place. logits: `[vocab]`; mask: `[words]` int32."""
    logits.masked_fill_(~unpacked(mask[None], len(logits))[0], NEVER)


def set_masks(token_state: Tensor, slots: Tensor, masks: Tensor) -> None:
    """Flag in the slots' rows of `token_state` the tokens that the masks lack, and no others.

    Args:
        token_state: `[N, vocab]` int32, changed.
        slots: `[B]` int32, each slot once.
        masks: `[B, words]` int32, at least as many words as the vocabulary needs.
    """
    if use_triton(token_state):
        set_masks_triton(token_state, slots, masks)
    else:
        set_masks_reference(token_state, slots, masks)


def set_masks_reference(token_state: Tensor, slots: Tensor, masks: Tensor) -> None:
    """`set_masks` in plain PyTorch."""
    index = slots.long()
    allowed = unpacked(masks, token_state.shape[1])
    token_state[index] = token_state[index] & ~MASKED | torch.where(allowed, 0, MASKED).int()


def set_masks_triton(token_state: Tensor, slots: Tensor, masks: Tensor, *, tile: int = _TILE) -> None:
    """`set_masks` by a Triton kernel, launched in the order of the stream: it is not one of a step's own."""
    vocab = token_state.shape[1]
    _set_kernel[(len(slots), -(-vocab // tile))](
        token_state, token_state.stride(0), slots, masks, masks.stride(0), vocab, TILE=tile, num_warps=4
    )


@triton.jit
def _set_kernel(state_ptr, state_stride, slots_ptr, masks_ptr, mask_stride, vocab, TILE: tl.constexpr):
    row = tl.program_id(0)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    valid = ids < vocab
    words = tl.load(masks_ptr + row.to(tl.int64) * mask_stride + ids // 32, mask=valid, other=0)
    flags = state_ptr + tl.load(slots_ptr + row).to(tl.int64) * state_stride + ids
    known = tl.load(flags, mask=valid, other=0) & _OTHERS
    tl.store(flags, tl.where(((words >> (ids % 32)) & 1) == 0, known | _FLAG, known), mask=valid)
