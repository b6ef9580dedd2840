"""Requests that came before this router has seen a worker: what they ask for cannot be checked yet, so they wait here.

The dispatcher's WAITING (dispatch.py) is for those behind them: the same patience, and the same errors.
"""

from __future__ import annotations

import asyncio

from penstock.common.errors import Unavailable
from penstock.router.dispatch import MAX_WAITING, TOO_MANY_WAIT
from penstock.router.dispatch_state import patience


class FirstWorker:
    """Of one router. All methods belong to its event loop."""

    def __init__(self, queue_timeout_s: float) -> None:
        self._patience_s = patience(queue_timeout_s)
        self._known = asyncio.Event()  # it has come, or will not be waited for any more
        self._refusal = ""
        self._waiting = 0

    def has_come(self) -> None:
        """A decode worker is there: from now on the model is known."""
        self._known.set()

    def refuse(self, reason: str) -> None:
        """Who still waits is told this."""
        self._refusal = reason
        self._known.set()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._waiting

    async def wait(self, reason: str) -> None:
        """Until it has come; `reason`: why there is none.

        Raises:
            Unavailable: it has not come in time, too many wait, or `refuse` was called.
        """
        if self._waiting >= MAX_WAITING:
            raise Unavailable(TOO_MANY_WAIT)
        self._waiting += 1
        try:
            await asyncio.wait_for(self._known.wait(), self._patience_s)
        except asyncio.TimeoutError:
            raise Unavailable(f"no worker came up within {self._patience_s:.0f} s: {reason}") from None
        finally:
            self._waiting -= 1
        if self._refusal:
            raise Unavailable(self._refusal)
