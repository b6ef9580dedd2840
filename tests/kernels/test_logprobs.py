"""Log-probabilities against a float64 softmax, and against what the engine's sampler reports on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.common.sampling import SamplingParams
from penstock.engine.sampler import SamplingRow, sample
from penstock.kernels.logprobs import token_logprobs, token_logprobs_reference, token_logprobs_triton

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]
NEVER = float("-inf")


def normal(rows: int, vocab: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def check(logits: Tensor, tokens: Tensor, top: int, device: str, tile: int) -> None:
    """Both forms against float64. `logits` may be on any device; its type is the one that is tested."""
    exact = logits.double().log_softmax(-1).cpu()
    chosen = exact.gather(-1, tokens[:, None])
    values = exact.sort(dim=-1, descending=True).values[:, :top]
    results = [token_logprobs_triton(logits.to(device), tokens.to(device), top, tile=tile)]
    if device == "cpu":
        results.append(token_logprobs_reference(logits, tokens, top))
    for result in results:
        logprob, rank, top_ids, top_logprobs = (part.cpu() for part in result)
        torch.testing.assert_close(logprob, chosen[:, 0].float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(rank, (exact > chosen).sum(-1) + 1)
        torch.testing.assert_close(top_logprobs, values.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exact.gather(-1, top_ids), values)
        assert all(len(set(row)) == len(row) for row in top_ids.tolist())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "tile"), [(1, 50, 64), (3, 131, 32), (2, 1003, 64)])
def test_equals_float64(rows: int, vocab: int, tile: int, dtype: torch.dtype, device: str) -> None:
    logits = normal(rows, vocab, vocab).to(dtype)
    tokens = torch.tensor([vocab - 1, 0, 17][:rows])
    for top in (0, 5):
        check(logits, tokens, top, device, tile)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_forbidden_tokens_and_large_logits(device: str) -> None:
    logits = torch.full((5, 131), NEVER)
    logits[0, 7] = 3.0  # certain
    logits[1] = 2.5  # all equal: every rank is 1
    logits[2] = normal(1, 131, 1)[0] + 1e4
    logits[3, [3, 90, 91]] = torch.tensor([-80.0, -80.0, -79.0])
    logits[4] = normal(1, 131, 2)[0]
    logits[4, ::2] = NEVER
    check(logits, torch.tensor([7, 130, 5, 3, 9]), 1, device, 32)
    wide = torch.zeros(5, 200)
    wide[:, 20:151] = logits
    check(wide[:, 20:151], torch.tensor([7, 130, 5, 90, 77]), 1, device, 64)


@pytest.mark.parametrize("device", DEVICES)
def test_more_tokens_asked_for_than_there_are(device: str) -> None:
    check(normal(2, 50, 4), torch.tensor([1, 2]), 60, device, 32)


def test_no_rows() -> None:
    empty = token_logprobs_triton(torch.empty(0, 50), torch.empty(0, dtype=torch.int64), 3)
    assert [tuple(part.shape) for part in empty] == [(0,), (0,), (0, 3), (0, 3)]


@pytest.mark.parametrize("device", DEVICES)
def test_equals_what_the_hosts_sampler_reports(device: str) -> None:
    logits = normal(3, 101, 7)
    params = SamplingParams(temperature=0.0, logprobs=4)
    tokens, expected = sample(logits, [SamplingRow(params, 0, [1], 1, ())] * 3)
    results = token_logprobs_triton(logits.to(device), torch.tensor(tokens, device=device), 4, tile=32)
    public = token_logprobs(logits.to(device), torch.tensor(tokens, device=device), 4)
    for logprob, rank, top_ids, top_logprobs in (results, public):
        for i, item in enumerate(expected):
            assert item is not None
            assert logprob[i].item() == pytest.approx(item.logprob, abs=1e-5)
            assert (rank[i].item(), top_ids[i].tolist()) == (item.rank, item.top_ids)
            assert top_logprobs[i].tolist() == pytest.approx(item.top_logprobs, abs=1e-5)
