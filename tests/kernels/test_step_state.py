"""The launches around a step against loops over tokens, which know a sequence as a list of its tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from penstock.kernels import launch
from penstock.kernels.launch import INTERPRETED
from penstock.kernels.step_state import apply_changes, begin_decode, begin_mixed

PAGE_SIZE, SLOTS, PAGES = 3, 7, 5
TURNS = 3
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


class State:
    """Slots with random lengths, last tokens and page tables, as lists and on a device."""

    def __init__(self, seed: int, device: str) -> None:
        self.pick = random.Random(seed)
        self.lengths = [self.pick.randrange(1, PAGE_SIZE * PAGES) for _ in range(SLOTS)]
        self.last = [self.pick.randrange(100, 200) for _ in range(SLOTS)]
        self.tables = [self.pick.sample(range(1000), PAGES) for _ in range(SLOTS)]
        self.on_device = [self.ints(x, device) for x in (self.lengths, self.last, self.tables)]
        self.turn = self.ints([1], device)
        self.device = device

    def ints(self, values: object, device: str) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def slot(self, row: int, position: int) -> int:
        return self.tables[row][position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE

    def outputs(self, count: int) -> dict[str, Tensor]:
        return {
            name: torch.full((count,), -7, dtype=torch.int64, device=self.device)
            for name in ("token_ids", "positions", "slots")
        }


@pytest.mark.parametrize("count", [1, 16, 300])
def test_changes_are_read_from_pinned_memory(device: str, count: int) -> None:
    changes = torch.tensor([*range(count), *range(1000, 1000 + count)], dtype=torch.int32, pin_memory=device == "cuda")
    state = torch.zeros(count + 3, dtype=torch.int32, device=device)
    apply_changes(state, changes, count)
    assert state.tolist() == [*range(1000, 1000 + count), 0, 0, 0]


@pytest.mark.parametrize("count", [1, 5, 300])
def test_changes_are_applied(device: str, count: int) -> None:
    pick = random.Random(count)
    state = torch.arange(1000, dtype=torch.int32, device=device)
    addresses, values = pick.sample(range(1000), count), [pick.randrange(-(2**31), 2**31) for _ in range(count)]
    apply_changes(state, torch.tensor([*addresses, *values, 5, 5], dtype=torch.int32, device=device), count)
    expected = list(range(1000))
    for address, value in zip(addresses, values, strict=True):
        expected[address] = value
    assert state.tolist() == expected


def test_a_decode_step_begins(device: str) -> None:
    state = State(1, device)
    rows = [4, -1, 0, 6, -1]
    found = state.outputs(len(rows))
    more = {name: torch.full((len(rows),), -7, dtype=torch.int32, device=device) for name in ("table_rows", "contexts")}
    lengths, last, tables = state.on_device
    begin_decode(state.ints(rows, device), lengths, last, tables, PAGE_SIZE, state.turn, TURNS, **found, **more)
    at = [state.lengths[row] for row in rows]
    assert found["token_ids"].tolist() == [state.last[row] if row >= 0 else 0 for row in rows]
    assert found["positions"].tolist() == [n if row >= 0 else 0 for row, n in zip(rows, at, strict=True)]
    assert found["slots"].tolist() == [state.slot(r, n) if r >= 0 else -1 for r, n in zip(rows, at, strict=True)]
    assert more["table_rows"].tolist() == [max(row, 0) for row in rows]
    assert more["contexts"].tolist() == [n + 1 if row >= 0 else 0 for row, n in zip(rows, at, strict=True)]
    assert lengths.tolist() == [n + (row in rows) for row, n in enumerate(state.lengths)]
    assert last.tolist() == state.last
    assert state.turn.tolist() == [2]


def test_a_step_with_prompts_begins(device: str) -> None:
    state = State(2, device)
    lengths, last, tables = state.on_device
    # Sequences: a decode, one that is padding, a chunk in mid-prompt, one more; then two tokens of padding.
    rows, counts, contexts = [5, -1, 2, 0], [1, 1, 4, 2], [9, 0, 11, 2]
    owners = [0, -1, 2, 2, 2, 2, 3, 3, -1, -1]
    given = [-1, 0, 21, 22, 23, 24, 31, 32, 0, 0]
    found = state.outputs(len(owners))
    begin_mixed(
        *(state.ints(values, device) for values in (owners, given, rows, contexts, [0, 1, 2, 6, 8])),
        lengths, last, tables, PAGE_SIZE, state.turn, TURNS, **found,
    )  # fmt: skip
    begins = [context - count for context, count in zip(contexts, counts, strict=True)]
    positions = [begins[0], 0, *range(begins[2], 11), *range(begins[3], 2), 0, 0]
    expected = [state.slot(rows[s], n) if s >= 0 else -1 for s, n in zip(owners, positions, strict=True)]
    assert found["token_ids"].tolist() == [state.last[5], 0, 21, 22, 23, 24, 31, 32, 0, 0]
    assert found["positions"].tolist() == positions
    assert found["slots"].tolist() == expected
    assert lengths.tolist() == [{5: 9, 2: 11, 0: 2}.get(row, n) for row, n in enumerate(state.lengths)]
    assert state.turn.tolist() == [2]


@pytest.mark.parametrize("count", [1, 600])
def test_steps_take_turns(device: str, count: int) -> None:
    """Once each, however many programs begin a step."""
    turn, none = torch.tensor([1], dtype=torch.int32, device=device), torch.full((count,), -1, dtype=torch.int32)
    state, more = State(4, device), torch.zeros(2, count, dtype=torch.int32, device=device)
    seen = []
    for _ in range(4):
        outputs = state.outputs(count)
        begin_decode(
            none.to(device), *state.on_device, PAGE_SIZE, turn, TURNS, **outputs, table_rows=more[0], contexts=more[1]
        )
        seen.append(turn.item())
    assert seen == [2, 0, 1, 2]
