"""The small launches before a step: apply the host's changes, lay the step's tokens out.

What the device knows of the running sequences lies in one int32 tensor, the state (engine/batch_state.py says where
what is). It advances by itself, so that a decode step that the host did not change needs nothing from it: lengths and
the steps' turn when a step begins, last tokens when they are drawn (kernels/sample.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import pdl_options, use_triton

_BLOCK = 128  # an element a thread: int32 and int64 share a layout, so that no thread waits for another


def apply_changes(state: Tensor, changes: Tensor, count: int) -> None:
    """state[changes[i]] = changes[count + i] for i < count; both int32 (changes may be pinned), no address twice."""
    if not use_triton(state):
        state[changes[:count].long()] = changes[count : 2 * count]
        return
    _apply_kernel[(-(-count // _BLOCK),)](state, changes, count, BLOCK=_BLOCK, **pdl_options(state))


def begin_decode(
    rows: Tensor,
    lengths: Tensor,
    last_tokens: Tensor,
    page_tables: Tensor,
    page_size: int,
    turn: Tensor,
    turns: int,
    *,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    table_rows: Tensor,
    contexts: Tensor,
) -> None:
    """One token of each of B sequences: fills the last five, `[B]`, from the state; lengths grow by it.

    rows: int32 [B], a sequence's row in lengths [N], last_tokens [N] and page_tables [N, W], each once; -1 is padding:
    slot -1, context 0. token_ids, positions and slots are int64, table_rows and contexts int32.

    turn: int32 [1], in which of `turns` places the host reads what a step samples: the next one, again and again.
    """
    if not use_triton(rows):
        live = rows >= 0
        row = rows.clamp(min=0).long()
        position = torch.where(live, lengths[row], 0).long()
        token_ids.copy_(torch.where(live, last_tokens[row], 0))
        positions.copy_(position)
        slots.copy_(torch.where(live, _slot(page_tables, row, position, page_size), -1))
        table_rows.copy_(row)
        contexts.copy_(torch.where(live, position + 1, 0))
        lengths[row[live]] = contexts[live]
        turn.add_(1).remainder_(turns)
        return
    _begin_decode_kernel[(-(-len(rows) // _BLOCK),)](
        rows,
        lengths,
        last_tokens,
        page_tables,
        token_ids,
        positions,
        slots,
        table_rows,
        contexts,
        len(rows),
        page_tables.stride(0),
        page_size,
        turn,
        turns,
        BLOCK=_BLOCK,
        **pdl_options(rows),
    )


def begin_mixed(
    owners: Tensor,
    given: Tensor,
    rows: Tensor,
    contexts: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    last_tokens: Tensor,
    page_tables: Tensor,
    page_size: int,
    turn: Tensor,
    turns: int,
    *,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
) -> None:
    """T tokens of S sequences: fills the last three, int64 `[T]`; the sequences' lengths become their contexts.

    owners: int32 [T], which sequence a token is of; -1: padding (slot -1). given: int32 [T], the token's id, or -1 for
    the sequence's last sampled one. rows, contexts: int32 [S]; query_starts: int32 [S + 1], as in `PagedBatch`.
    What lengths, last_tokens, page_tables and turn are: as in `begin_decode`.
    """
    if not use_triton(owners):
        live = owners >= 0
        owner = owners.clamp(min=0).long()
        row = torch.where(live, rows[owner], 0).long()
        behind = query_starts[owner + 1] - torch.arange(len(owners), device=owners.device)
        position = torch.where(live, contexts[owner] - behind, 0)
        token_ids.copy_(torch.where(live, torch.where(given < 0, last_tokens[row], given), 0))
        positions.copy_(position)
        slots.copy_(torch.where(live, _slot(page_tables, row, position, page_size), -1))
        ends = live & (behind == 1)
        lengths[row[ends]] = contexts[owner[ends]]
        turn.add_(1).remainder_(turns)
        return
    _begin_mixed_kernel[(-(-len(owners) // _BLOCK),)](
        owners,
        given,
        rows,
        contexts,
        query_starts,
        lengths,
        last_tokens,
        page_tables,
        token_ids,
        positions,
        slots,
        len(owners),
        page_tables.stride(0),
        page_size,
        turn,
        turns,
        BLOCK=_BLOCK,
        **pdl_options(owners),
    )


def _slot(page_tables: Tensor, row: Tensor, position: Tensor, page_size: int) -> Tensor:
    return page_tables[row, position // page_size].long() * page_size + position % page_size


@triton.jit(do_not_specialize=["count"])
def _apply_kernel(state_ptr, changes_ptr, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = i < count
    where = tl.load(changes_ptr + i, mask=used, other=0)
    value = tl.load(changes_ptr + count + i, mask=used, other=0)
    tl.store(state_ptr + where, value, mask=used)


@triton.jit
def _advance(turn_ptr, turns):
    if tl.program_id(0) == 0:
        turn = tl.load(turn_ptr) + 1
        tl.store(turn_ptr, tl.where(turn < turns, turn, 0))


@triton.jit(do_not_specialize=["count"])
def _begin_decode_kernel(
    rows_ptr,
    lengths_ptr,
    last_ptr,
    tables_ptr,
    ids_ptr,
    positions_ptr,
    slots_ptr,
    table_rows_ptr,
    contexts_ptr,
    count,
    table_stride,
    page_size,
    turn_ptr,
    turns,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = i < count
    _advance(turn_ptr, turns)
    row = tl.load(rows_ptr + i, mask=used, other=-1)
    live = row >= 0
    position = tl.load(lengths_ptr + row, mask=live, other=0)
    page = tl.load(tables_ptr + row.to(tl.int64) * table_stride + position // page_size, mask=live, other=0)
    slot = page.to(tl.int64) * page_size + position % page_size
    tl.store(ids_ptr + i, tl.load(last_ptr + row, mask=live, other=0).to(tl.int64), mask=used)
    tl.store(positions_ptr + i, position.to(tl.int64), mask=used)
    tl.store(slots_ptr + i, tl.where(live, slot, -1), mask=used)
    tl.store(table_rows_ptr + i, tl.where(live, row, 0), mask=used)
    tl.store(contexts_ptr + i, tl.where(live, position + 1, 0), mask=used)
    tl.store(lengths_ptr + row, position + 1, mask=live)


@triton.jit(do_not_specialize=["count"])
def _begin_mixed_kernel(
    owners_ptr,
    given_ptr,
    rows_ptr,
    contexts_ptr,
    starts_ptr,
    lengths_ptr,
    last_ptr,
    tables_ptr,
    ids_ptr,
    positions_ptr,
    slots_ptr,
    count,
    table_stride,
    page_size,
    turn_ptr,
    turns,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = i < count
    _advance(turn_ptr, turns)
    owner = tl.load(owners_ptr + i, mask=used, other=-1)
    live = owner >= 0
    row = tl.load(rows_ptr + owner, mask=live, other=0)
    token = tl.load(given_ptr + i, mask=used, other=0)
    token = tl.where(live & (token < 0), tl.load(last_ptr + row, mask=live, other=0), token)
    behind = tl.load(starts_ptr + owner + 1, mask=live, other=0) - i  # tokens up to the sequence's end
    context = tl.load(contexts_ptr + owner, mask=live, other=0)
    position = tl.where(live, context - behind, 0)
    page = tl.load(tables_ptr + row.to(tl.int64) * table_stride + position // page_size, mask=live, other=0)
    slot = page.to(tl.int64) * page_size + position % page_size
    tl.store(ids_ptr + i, tl.where(live, token, 0).to(tl.int64), mask=used)
    tl.store(positions_ptr + i, position.to(tl.int64), mask=used)
    tl.store(slots_ptr + i, tl.where(live, slot, -1), mask=used)
    tl.store(lengths_ptr + row, context, mask=live & (behind == 1))
