"""Philox against the published known answers, and the noise against the distribution it must have."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.philox import exponential_noise, philox4x32

# Known-answer tests of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_known_answers(key: tuple[int, int], counter: tuple[int, ...], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    words = philox4x32((torch.tensor([key[0]]), torch.tensor([key[1]])), (c0, c1, c2, c3))
    assert tuple(int(word) for word in words) == expected


def test_a_rows_noise_does_not_depend_on_the_batch() -> None:
    seeds = torch.tensor([5, -3, 2**62])
    positions = torch.tensor([1, 7, 100_000])
    together = exponential_noise(seeds, positions, 0, 1003)
    assert together.shape == (3, 1003)
    for i in range(3):
        assert torch.equal(exponential_noise(seeds[i : i + 1], positions[i : i + 1], 0, 1003)[0], together[i])
    assert torch.equal(exponential_noise(seeds, positions, 0, 600), together[:, :600])
    assert not torch.equal(exponential_noise(seeds, positions, 1, 1003), together)


def test_noise_is_exponential_and_uncorrelated() -> None:
    noise = exponential_noise(torch.arange(64), torch.arange(64) * 3, 0, 4096).double()
    assert noise.min() > 0
    assert noise.isfinite().all()
    ordered = noise.flatten().sort().values
    uniform = 1 - torch.exp(-ordered)
    expected = (torch.arange(len(uniform)).double() + 0.5) / len(uniform)
    assert (uniform - expected).abs().max() < 2.2 / len(uniform) ** 0.5  # Kolmogorov-Smirnov, p about 1e-4
    centred = noise - 1
    assert (centred[:, 1:] * centred[:, :-1]).mean().abs() < 5 / noise.numel() ** 0.5
    assert (centred[1:] * centred[:-1]).mean().abs() < 5 / noise.numel() ** 0.5
