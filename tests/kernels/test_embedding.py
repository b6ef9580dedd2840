"""Embeddings against rows picked one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from penstock.kernels.embedding import embed, embed_triton
from tests.kernels.variants import variants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "n"), [(1, 8), (5, 1024), (3, 1536), (7, 2050)])
@pytest.mark.parametrize(("op", "device"), variants(embed, embed_triton))
def test_is_the_row_of_each_token(
    op: Callable[..., Tensor], device: str, tokens: int, n: int, dtype: torch.dtype
) -> None:
    draws = torch.Generator().manual_seed(tokens)
    table = torch.randn(11, n, generator=draws).to(dtype)
    ids = torch.randint(11, (tokens + 1,), generator=draws)
    found = op(ids.to(device)[1:], table.to(device)).cpu()  # an address that is no multiple of 16
    assert found.shape == (tokens, n)
    assert all(torch.equal(row, table[token]) for row, token in zip(found, ids[1:].tolist(), strict=True))
