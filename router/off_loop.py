"""Work that would hold up the event loop, in a few threads: tokenising and hashing long prompts, long templates.

Few, because more threads than cores only make everybody wait longer: what does not fit waits in order. The tokenizer's
Rust code releases the interpreter lock; what is written in Python holds it for `sys.getswitchinterval` at a time, and
that is what a token in the loop then waits. `serve` makes it short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from penstock.common.cores import available_cores

MOST_THREADS = 4
SWITCH_INTERVAL_S = 0.0005  # Python's own 5 ms would be added to each wake-up of the loop while a thread computes

_T = TypeVar("_T")


class OffLoop:
    """Threads for work beside the event loop; they start with the first piece of work."""

    def __init__(self, threads: int | None = None) -> None:
        """`threads`: default one a core this process may use, and at most `MOST_THREADS`."""
        self._pool = ThreadPoolExecutor(threads or min(available_cores(), MOST_THREADS), thread_name_prefix="off-loop")

    async def run(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, computed in a thread. Work that nobody waits for any more is not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """End the threads; work that has not begun is given up."""
        self._pool.shutdown(wait=True, cancel_futures=True)
