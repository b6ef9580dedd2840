"""Philox4x32-10, a counter-based random generator: the same (key, counter) gives the same numbers everywhere.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Triton's `tl.philox` computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MUL_0, _MUL_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Four 32-bit words for each element. Tensors are int64 holding 32-bit values, of shapes that broadcast."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # The 64-bit product wraps into the sign bit; shift and mask recover both halves.
        p0, p1 = c0 * _MUL_0, c2 * _MUL_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return [c0, c1, c2, c3]


def exponential_noise(seeds: Tensor, positions: Tensor, purpose: int, num_tokens: int) -> Tensor:
    """Exponential(1) noise for every token id, `[N, num_tokens]` float32.

    Args:
        seeds: `[N]` int64, one 64-bit seed a row.
        positions: `[N]` int64, position of the token to be sampled in its sequence.
        purpose: tells draws for different ends at one position apart (0: sampling).

    Element (row, t) depends on (seeds[row], positions[row], purpose, t) only. Argmin of noise / probability samples
    from the distribution, which is Gumbel-max written without the outer logarithm. 32 bits of resolution lie where they
    matter, at small noise, so that even a token of probability 1e-9 is sampled as often as it should be.
    """
    groups = torch.arange(-(-num_tokens // 4), device=seeds.device)
    words = philox4x32(
        ((seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]),
        (
            groups[None, :],
            positions[:, None],
            torch.full_like(positions, purpose)[:, None],
            torch.zeros_like(groups)[None, :],
        ),
    )
    bits = torch.stack(words, dim=-1).flatten(1)[:, :num_tokens]
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp_(max=1.0 - 2.0**-24))
