"""Asyncio tasks: that go on for ever, that end for certain, and doing without them."""

from __future__ import annotations

import asyncio
import logging
import time
import types
from collections.abc import Awaitable, Callable, Generator, Iterable
from typing import Any

from penstock.common.logs import WarningLimiter

ASK_AGAIN_S = 0.2
FAILED_LOG_S = 60.0  # between two tracebacks of one kind


async def take_turns(turn: Callable[[], Awaitable[None]], pause_s: Callable[[], float], log: logging.Logger) -> None:
    """Await `turn` for ever, with pauses. One that raises is logged, and the next one comes all the same: what it was
    (no file descriptor left, say) may have passed by then, and without any more turns everything would stand still.
    """
    limiter = WarningLimiter(FAILED_LOG_S)
    task = asyncio.current_task()
    name = task.get_name() if task else ""
    while True:
        try:
            await turn()
        except Exception as error:
            limiter.warn(log, type(error).__name__, f"{name}: a turn failed: {error}", time.monotonic(), error)
        await asyncio.sleep(pause_s())


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
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
