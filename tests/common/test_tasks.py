"""Tasks that nothing ends, ending tasks, also such as lose a cancel, and work without a task."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import pytest

from penstock.common.tasks import begun, end_tasks, take_turns


def test_turns_go_on_whatever_one_of_them_raises(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        pauses: list[float] = []
        enough = asyncio.Event()

        async def turn() -> None:
            if len(pauses) == 7:
                enough.set()
            if len(pauses) < 4:
                raise OSError("no descriptor left")
            if len(pauses) == 5:
                raise ValueError("another kind")

        def pause_s() -> float:
            pauses.append(0.0)
            return 0.0

        task = asyncio.create_task(take_turns(turn, pause_s, logging.getLogger("turns")), name="tick")
        await asyncio.wait_for(enough.wait(), 60)
        await end_tasks([task])
        assert task.cancelled()

    asyncio.run(scenario())
    told = [(record.levelname, record.message) for record in caplog.records]
    messages = ["tick: a turn failed: no descriptor left", "tick: a turn failed: another kind"]
    assert told == [("ERROR", message) for message in messages], "once of each kind"
    assert all(record.exc_info for record in caplog.records)


def test_a_lost_cancel_is_asked_again() -> None:
    async def scenario() -> None:
        lost: list[int] = []

        async def for_ever() -> None:
            while True:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    if len(lost) == 2:
                        raise
                    lost.append(1)

        async def failing() -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
            raise ValueError("on the way out")

        tasks = [asyncio.create_task(for_ever()), asyncio.create_task(failing())]
        await asyncio.sleep(0)
        await end_tasks(tasks)
        assert len(lost) == 2 and all(task.done() for task in tasks)
        await end_tasks(tasks)
        await end_tasks([])

    asyncio.run(scenario())


def test_work_begins_at_once_and_what_waits_goes_on_where_it_is_awaited() -> None:
    async def check() -> None:
        done: list[str] = []
        gate = asyncio.Event()

        async def work(*, fails: bool = False) -> None:
            done.append("begun")
            await gate.wait()
            await asyncio.sleep(0)
            done.append("through")
            if fails:
                raise ValueError("as it should")

        gate.set()
        rest = begun(work())  # waits once, for a turn of the loop
        assert rest is not None and done == ["begun"]
        await rest
        assert done == ["begun", "through"]
        gate.clear()
        rest = begun(work(fails=True))
        assert rest is not None and done[2:] == ["begun"]
        asyncio.get_running_loop().call_soon(gate.set)
        with pytest.raises(ValueError, match="as it should"):
            await rest

    asyncio.run(check())


def test_work_that_never_waits_is_through_at_once() -> None:
    async def work(fails: bool) -> None:
        if fails:
            raise ValueError("as it should")

    assert begun(work(fails=False)) is None
    with pytest.raises(ValueError, match="as it should"):
        begun(work(fails=True))
