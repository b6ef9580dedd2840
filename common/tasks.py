"""Ending asyncio tasks for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

ASK_AGAIN_S = 0.2


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until all have ended; their errors are theirs to report.

    Asks until it is heard: before Python 3.12 `asyncio.wait_for`, and what Redis' client builds on it, loses a cancel
    that crosses its result, and a task that runs for ever then does so (https://github.com/python/cpython/issues/86296).
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=ASK_AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()
