"""Work in slices: all of it, in order, and the event loop has its turns between."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from penstock.router.slices import LOOK_AFTER, MOST_ITEMS, SLICE_S, Slices


class Bench:
    """Items that take a given time each, on a clock of their own, and what was done at each turn of the loop."""

    def __init__(self, item_s: float) -> None:
        self.now = 0.0
        self.done: list[int] = []
        self.turns: list[int] = []  # how much had been done at each turn of the loop
        self.slices = Slices(self.do, lambda: self.now)
        self._item_s = item_s

    def do(self, item: int) -> None:
        self.done.append(item)
        self.now += self._item_s

    async def all_done(self, number: int) -> None:
        while len(self.done) < number:
            self.turns.append(len(self.done))
            await asyncio.sleep(0)

    @property
    def largest(self) -> int:
        """Most items of one slice."""
        marks = [0, *self.turns, len(self.done)]
        return max(after - before for before, after in itertools.pairwise(marks))


@pytest.mark.parametrize(("item_s", "most"), [(SLICE_S / 10, 16), (SLICE_S * 3, LOOK_AFTER), (0.0, MOST_ITEMS)])
def test_the_loop_has_its_turns_between(item_s: float, most: int) -> None:
    async def check() -> None:
        bench = Bench(item_s)
        bench.slices.extend(range(1000))
        await bench.all_done(1000)
        assert bench.done == list(range(1000)) and bench.largest == most and not bench.slices

    asyncio.run(check())


def test_what_comes_meanwhile_waits_its_turn() -> None:
    async def check() -> None:
        bench = Bench(SLICE_S / 10)
        bench.slices.extend(range(16))
        assert len(bench.done) == 16, "at once"
        bench.slices.extend(range(16, 100))
        assert len(bench.done) == 16, "a slice has just been"
        bench.turns.append(16)
        await asyncio.sleep(0)
        assert 16 < len(bench.done) < 100
        for item in range(100, 150):
            bench.slices.add(item)
        bench.slices.extend(range(150, 200))
        await bench.all_done(200)
        assert bench.done == list(range(200)) and bench.largest == 16
        bench.now += 2 * SLICE_S
        bench.slices.add(200)
        assert len(bench.done) == 200, "what is added waits in any case: more may come in this turn"
        bench.slices.extend([201])
        await bench.all_done(202)
        assert bench.done == list(range(202))

    asyncio.run(check())


def test_one_that_fails_costs_nobody_else_his_turn() -> None:
    failed: list[Any] = []

    def do(item: int) -> None:
        if item % 3 == 0:
            raise RuntimeError(f"item {item}")
        done.append(item)

    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context["exception"]))
        slices = Slices(do)
        for item in range(9):
            slices.add(item)
        while slices:
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    done: list[int] = []
    asyncio.run(check())
    assert done == [1, 2, 4, 5, 7, 8] and len(failed) == 3
