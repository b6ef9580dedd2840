"""The sampler against Hugging Face's logits processors and against the distributions it must draw from."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from penstock.common.sampling import SamplingParams
from penstock.engine.sampler import SamplingRow, noise_seed, sample
from penstock.kernels.filters import apply_penalties, filter_min_p, filter_top_k_top_p

VOCAB = 101


def make_row(
    params: SamplingParams, tokens: list[int], prompt_len: int = 1, forbidden: tuple[int, ...] = ()
) -> SamplingRow:
    return SamplingRow(params, noise_seed(params.seed, 0), tokens, prompt_len, forbidden)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_filters_equal_hugging_face() -> None:
    logits = random_logits(5)
    ids = torch.zeros(5, 1, dtype=torch.long)
    top_k = torch.tensor([1, 5, 50, VOCAB, 7])
    top_p = torch.tensor([0.3, 0.9, 0.5, 0.7, 1.0])
    ours = filter_top_k_top_p(logits, top_k, top_p)
    for i in range(5):
        theirs = TopKLogitsWarper(int(top_k[i]))(ids[:1], logits[i : i + 1].clone())
        if top_p[i] < 1:
            theirs = TopPLogitsWarper(float(top_p[i]))(ids[:1], theirs)
        assert torch.equal(ours[i : i + 1].isinf(), theirs.isinf())
        kept = ~theirs.isinf()
        assert torch.equal(ours[i : i + 1][kept], logits[i : i + 1][kept])
    min_p = torch.tensor([0.0, 0.05, 0.5, 1.0, 0.2])
    ours = filter_min_p(logits, min_p)
    for i in range(5):
        theirs = MinPLogitsWarper(float(min_p[i]))(ids[:1], logits[i : i + 1].clone())
        assert torch.equal(ours[i : i + 1].isinf(), theirs.isinf())


def test_penalties() -> None:
    logits = random_logits(1)
    prompt, output = torch.tensor([3, 4, 4]), torch.tensor([4, 9, 9, 9])
    ours = logits[0].clone()
    apply_penalties(ours, prompt, output, repetition=1.3, frequency=0.0, presence=0.0)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.cat([prompt, output])[None], logits.clone())
    assert torch.equal(ours, theirs[0])
    ours = logits[0].clone()
    apply_penalties(ours, prompt, output, repetition=1.0, frequency=0.5, presence=0.25)
    expected = logits[0].clone()  # OpenAI: count * frequency + (count > 0) * presence, of generated tokens
    expected[4] -= 0.75
    expected[9] -= 1.75
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "params",
    [
        {}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}, {"temperature": 0.5},
        {"top_k": 7, "top_p": 0.8, "min_p": 0.02, "temperature": 1.5},
    ],
)  # fmt: skip
def test_draws_follow_the_distribution(params: dict[str, float]) -> None:
    """Chi-squared over many positions of one seed: the very stream that a long request uses."""
    sampling = SamplingParams(seed=11, **params)  # type: ignore[arg-type]
    logits = random_logits(1, seed=3)[:, :12]
    count = 20_000
    rows = [SamplingRow(sampling, noise_seed(11, 0), range(position), 1, ()) for position in range(1, count + 1)]
    tokens, _ = sample(logits.expand(count, -1), rows)
    warped = logits / sampling.temperature
    if "min_p" in params:
        warped = filter_min_p(warped, torch.tensor([sampling.min_p]))
    if "top_k" in params or "top_p" in params:
        warped = filter_top_k_top_p(warped, torch.tensor([sampling.top_k or 12]), torch.tensor([sampling.top_p]))
    expected = warped.softmax(-1)[0].double() * count
    observed = torch.bincount(torch.tensor(tokens), minlength=12).double()
    assert observed[expected == 0].sum() == 0
    likely = expected > 5
    chi2 = ((observed - expected)[likely] ** 2 / expected[likely]).sum().item()
    assert chi2 < 45  # at most 11 degrees of freedom: p below 1e-5


def test_rows_do_not_influence_each_other() -> None:
    logits = random_logits(6)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=3),
        SamplingParams(seed=3, top_p=0.8, repetition_penalty=1.5),
        SamplingParams(seed=4, min_p=0.2, presence_penalty=1.0),
        SamplingParams(seed=5, temperature=2.0, logprobs=2),
    ]
    rows = [make_row(p, [1, 5, 5, 7]) for p in params]
    together, _ = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0][0] for i in range(6)]
    assert together == alone
    assert together[0] == logits[0].argmax()


def test_choices_draw_differently_and_seeds_repeat() -> None:
    assert noise_seed(1, 0) == noise_seed(1, 0)
    assert len({noise_seed(seed, choice) for seed in range(10) for choice in range(10)}) == 100


def test_min_tokens_forbids_what_would_end_the_request() -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    params = SamplingParams(temperature=0.0, min_tokens=2)
    assert sample(logits, [make_row(params, [1, 2], forbidden=(best,))])[0][0] == logits[0].topk(2).indices[1]
    assert sample(logits, [make_row(params, [1, 2, 3], forbidden=(best,))])[0] == [best]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = random_logits(2)
    params = SamplingParams(temperature=0.0, logprobs=3, repetition_penalty=5.0)
    best = int(logits[0].argmax())
    tokens, logprobs = sample(logits, [make_row(params, [best]), make_row(SamplingParams(seed=1), [1])])
    assert logprobs[1] is None
    found = logprobs[0]
    assert found is not None
    reference = logits[0].log_softmax(-1)
    assert found.logprob == pytest.approx(reference[tokens[0]].item())
    assert found.rank == int((reference > reference[tokens[0]]).sum()) + 1
    assert found.top_ids == reference.topk(3).indices.tolist()
    assert found.top_logprobs == pytest.approx(reference.topk(3).values.tolist())
