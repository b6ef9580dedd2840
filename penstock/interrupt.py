"""What Ctrl-C does where an exception in the middle of things would do harm.

`HeldInterrupt` has it wait until between two steps: `LLM` uses it, so that its ledger of pages is never half changed.
The command line leaves at once while nothing has begun: an exception would come out of some library's import, as a
traceback or not at all.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

INTERRUPTED = 130  # what a shell says of a process ended by Ctrl-C


def leave_at_once() -> None:
    """From now on SIGINT ends the process, unless it was ignored or handled before."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_interrupts() -> None:
    """Undo `leave_at_once`: SIGINT raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


class HeldInterrupt:
    """Within the block SIGINT waits for `deliver` or the end of the block; then the handler of before gets it.

    Does nothing outside the main thread, where no signal arrives, and where SIGINT has no Python handler.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGINT)
        self._holds = callable(self._handler) and threading.current_thread() is threading.main_thread()
        self._held: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> HeldInterrupt:
        if self._holds:
            signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, self._handler)
        self.deliver()

    def deliver(self) -> None:
        """Handle the SIGINT that came, if one did; raises KeyboardInterrupt unless the program has its own handler."""
        held, self._held = self._held, None
        if held is not None and callable(self._handler):
            self._handler(*held)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._held = number, frame
