"""From hidden states to attention's inputs: the joined query-key-value product, norms, rotation and storing.

One row goes through them in one launch, unless the model normalises queries and keys: a program has no whole head.
"""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.linear import Linear
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.rms_norm import Normed
from penstock.kernels.rotary_store import Heads, rotary_store
from penstock.kernels.row_linear import row_rotary_store


def attention_inputs(
    projection: Linear,
    x: Tensor | Normed,
    factors: tuple[Tensor, Tensor],
    k_pages: Tensor,
    v_pages: Tensor,
    batch: PagedBatch,
    heads: Heads,
) -> Tensor:
    """What `rotary_store` does with projection(x), x [T, hidden]."""
    row = projection.row(x, rotated=True) if heads.q_norm is None else None
    if row is not None:
        return row_rotary_store(row, factors, k_pages, v_pages, batch.slots, heads)
    return rotary_store(projection(x), factors, k_pages, v_pages, batch, heads)
