"""Ending tasks, also such as lose a cancel."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from penstock.common.tasks import end_tasks


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
