"""A layer from its query-key-value projection to attention's output: norms, rotation, storing, attending.

Models call it once a layer. Where every sequence brings one token, attention itself does what `rotary_store` does: a
launch less, which counts in steps of few sequences. Everywhere else the two follow each other.
"""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.decode_attention import Projection, block_rows, decode_attention
from penstock.kernels.launch import use_triton
from penstock.kernels.paged_attention import decode_workspace, paged_attention
from penstock.kernels.paged_batch import PagedBatch
from penstock.kernels.rotary_store import check_norms, check_strides, rotary_store

_MOST_SEQUENCES = 1 << 20  # that are attended to in one launch; not measured yet: all there can be


def store_and_attend(
    qkv: Tensor,
    factors: tuple[Tensor, Tensor],
    k_pages: Tensor,
    v_pages: Tensor,
    batch: PagedBatch,
    last_tokens: Tensor | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "AUTO",
) -> Tensor:
    """Attention's output `[T, num_heads, head_dim]`; the new tokens' keys and values are stored in the batch's slots.

    It is what `rotary_store` and `paged_attention` give in turn, bit by bit but for the order in which a norm's squares
    are added. The first arguments are those of `rotary_store`, the last those of `paged_attention`.

    Args:
        last_tokens: int `[S]`, which tokens are their sequences' last. The output is theirs only, `[S, ...]`.

    Raises:
        ValueError: as the two do.
    """
    if last_tokens is None and use_triton(qkv) and _in_one_launch(len(qkv), batch, num_heads // num_kv_heads):
        check_norms(q_norm, k_norm)
        check_strides(qkv, k_pages, v_pages)
        head_dim = k_pages.shape[3]
        out = qkv.new_empty((len(qkv), num_heads, head_dim))
        decode_attention(
            qkv.view(len(qkv), -1, head_dim),
            k_pages,
            v_pages,
            batch.page_tables,
            batch.table_rows,
            batch.contexts,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
            workspace=decode_workspace(batch, num_heads, k_pages),
            out=out,
            projection=Projection(*factors, batch.slots, q_norm, k_norm, eps),
        )
        return out
    q = rotary_store(
        qkv,
        factors,
        k_pages,
        v_pages,
        batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
    )
    if last_tokens is not None:
        q, batch = q.index_select(0, last_tokens), batch.at_ends(last_tokens)
    return paged_attention(
        q,
        k_pages,
        v_pages,
        batch,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        backend=backend,
    )


def _in_one_launch(tokens: int, batch: PagedBatch, group: int) -> bool:
    """Whether attention begins from the projection itself: every sequence has one token, and the key that a program
    turns beside its group's queries makes its products no larger.
    """
    return batch.num_decodes == tokens <= _MOST_SEQUENCES and block_rows(group + 1) == block_rows(group)
