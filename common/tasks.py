"""Ending asyncio tasks for certain, and doing without them."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Generator, Iterable
from typing import Any

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


class Done:
    """An awaitable with nothing to wait for."""

    def __await__(self) -> Generator[Any, Any, None]:
        """Done."""
        yield from ()


DONE = Done()


def begun(work: Awaitable[None]) -> Awaitable[None] | None:
    """Run `work` until it has to wait, here and now; what is left of it, None if nothing is.

    For work that hardly ever waits, and is not worth a task: it must not ask which task it runs in.
    """
    steps = work.__await__()
    try:
        waits_for = next(steps)
    except StopIteration:
        return None
    return _rest(steps, waits_for)


@types.coroutine
def _rest(steps: Generator[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    try:
        yield waits_for
    except BaseException:
        steps.close()
        raise
    yield from steps
