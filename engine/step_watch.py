"""A thread that waits for steps in the place of a worker's loop, which meanwhile hears what others say to it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

from penstock.engine.plan import StepHandle


class StepWatch:
    """Calls `wake` when a step that is watched has ended. A worker's steps take milliseconds to tenths of a second."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called in the watch's thread, which starts with the first step; it must not block."""
        self._wake = wake
        self._steps: queue.SimpleQueue[StepHandle | None] = queue.SimpleQueue()
        self._watched: StepHandle | None = None
        self._thread: threading.Thread | None = None

    def watch(self, step: StepHandle) -> None:
        """Once for each step, in their order; the one that is watched already is left as it is."""
        if step is self._watched:
            return
        self._watched = step
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="step-watch", daemon=True)
            self._thread.start()
        self._steps.put(step)

    def close(self) -> None:
        """Return when the last step has ended; nobody is woken afterwards."""
        if self._thread is not None:
            self._steps.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            with contextlib.suppress(Exception):  # whoever asks for the step's result gets it
                step.wait()
            self._wake()
