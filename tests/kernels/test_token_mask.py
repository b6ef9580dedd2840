"""Masks of tokens against sets of ids: on logits, and as flags that the sampler reads."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from penstock.kernels import launch
from penstock.kernels.launch import INTERPRETED
from penstock.kernels.sample import BANNED, IN_PROMPT, MASKED, USES_STATE, SampleWorkspace, SamplingColumns, sample
from penstock.kernels.token_mask import forbid_others, set_masks

DEVICES = [
    pytest.param("cpu", id="reference"),
    pytest.param("interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    launch.interpret_ops = request.param == "interpreter"
    yield "cuda" if request.param == "cuda" else "cpu"
    launch.interpret_ops = False


def packed(allowed: set[int], vocab: int, device: str, spare: int = 0) -> torch.Tensor:
    """[1, words] int32, with `spare` words more than the vocabulary needs."""
    value = sum(1 << token for token in allowed)
    size = 4 * (-(-vocab // 32) + spare)
    return torch.frombuffer(bytearray(value.to_bytes(size, "little")), dtype=torch.int32)[None].to(device)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000, 1251, 3000])
def test_flags_are_set_and_cleared(device: str, vocab: int) -> None:
    pick = random.Random(vocab)
    state = torch.randint(0, 2**30, (5, vocab), dtype=torch.int32)
    state[:, ::3] |= MASKED  # of a step before
    before = state.clone()
    slots = [3, 0, 4]
    allowed = [set(), set(range(vocab)), {token for token in range(vocab) if pick.random() < 0.3}]
    masks = torch.cat([packed(tokens, vocab, device, spare=1) for tokens in allowed])
    state = state.to(device)
    set_masks(state, torch.tensor(slots, dtype=torch.int32, device=device), masks)
    for slot, tokens in zip(slots, allowed, strict=True):
        assert {i for i, flags in enumerate(state[slot].tolist()) if flags >= 0} == tokens
    assert torch.equal((state & ~MASKED).cpu(), before & ~MASKED)
    assert torch.equal(state[[1, 2]].cpu(), before[[1, 2]])


def test_logits_of_others_are_forbidden() -> None:
    logits = torch.arange(40.0)
    forbid_others(logits, packed({0, 31, 32, 39}, 40, "cpu")[0])
    assert logits.isfinite().nonzero()[:, 0].tolist() == [0, 31, 32, 39]


def test_only_allowed_tokens_are_drawn(device: str) -> None:
    vocab, slots = 700, 4
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(slots, vocab, generator=generator)
    columns = SamplingColumns.allocate(slots, vocab, device)
    columns.uses_tokens.fill_(USES_STATE)
    columns.temperature.copy_(torch.tensor([0.0, 1.0, 5.0, 1.0]))
    columns.top_p.copy_(torch.tensor([1.0, 1.0, 1.0, 0.9]))
    columns.top_k.copy_(torch.tensor([0, 0, 50, 0]))
    columns.token_state[:, 5] = BANNED | IN_PROMPT
    allowed = [{5, 9, 77, 650}, {1, 5, 699}, set(range(100, 300)), {5, 333}]
    rows = torch.arange(slots, dtype=torch.int32, device=device)
    set_masks(columns.token_state, rows, torch.cat([packed(tokens, vocab, device) for tokens in allowed]))
    workspace = SampleWorkspace.allocate(slots, vocab, device)
    for position in range(10, 16):
        positions = torch.full((slots,), position, dtype=torch.int32, device=device)
        drawn = sample(logits.to(device), rows, positions, columns, workspace).tolist()
        assert all(token in tokens - {5} for token, tokens in zip(drawn, allowed, strict=True))
        assert drawn[0] == max(allowed[0] - {5}, key=lambda token: float(logits[0, token]))
    assert (columns.token_state & ~MASKED).sum() > 0  # counts were kept beside the masks
