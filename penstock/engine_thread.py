"""An engine that steps in a thread of its own, for `AsyncLLM`: requests in by a queue, tokens out by callbacks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from penstock.answers import New
from penstock.common.messages import GenerateRequest
from penstock.engine.core import Engine
from penstock.engine_run import key_of

Deliver = Callable[[New | Exception], None]
JOIN_TIMEOUT_S = 60.0  # a step on a slow machine

logger = logging.getLogger(__name__)


class EngineThread:
    """Steps as long as requests are open, and sleeps otherwise. All methods may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: stop
        self._open: dict[str, Deliver] = {}  # of the engine's thread
        self._failing = Lock()  # of `error`, and of requests that come while it is set
        self.error: Exception | None = None
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        """Have it computed; `deliver` gets its tokens, or the error that ended it, on the engine's thread.

        Raises:
            ValueError: there is no such thread any more.
        """
        with self._failing:
            if self.error is None:
                if not self._thread.is_alive():
                    raise ValueError("it is closed, or belongs to the process that this one is a fork of")
                self._inbox.put(lambda: self._add(request, deliver))
                return
        deliver(self._failure())

    def abort(self, request: GenerateRequest) -> None:
        """It needs no more tokens."""
        self._inbox.put(lambda: self._drop(key_of(request)))

    def close(self) -> None:
        """End after the step that is running; open requests get nothing more. Again: nothing."""
        self._inbox.put(None)
        self._thread.join(JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while self._obey():
                for output in self._engine.step().outputs:
                    deliver = self._open.get(output.key)
                    if output.finish is not None:
                        self._open.pop(output.key, None)
                    if deliver is not None:
                        deliver(output)
                self._engine.pages.drain_events()  # nobody else wants to know which prefixes are here
        except Exception as error:
            logger.exception("the engine failed")
            with self._failing:
                self.error = error
            while not self._inbox.empty():
                if command := self._inbox.get():
                    command()
            for deliver in self._open.values():
                deliver(self._failure())
        finally:
            for key in self._open:
                self._engine.scheduler.abort(key)
            self._engine.settle()
            self._engine.pages.drain_events()

    def _failure(self) -> RuntimeError:
        return RuntimeError(f"the engine failed: {self.error}")

    def _obey(self) -> bool:
        """Do what was asked, waiting for it while there is nothing to compute; False to stop."""
        while True:
            try:
                command = self._inbox.get(block=not self._engine.has_work())
            except Empty:
                return True
            if command is None:
                return False
            command()

    def _add(self, request: GenerateRequest, deliver: Deliver) -> None:
        try:
            self._open[self._engine.add(request)] = deliver
        except ValueError as error:  # it was not taken; another one may have its name
            deliver(error)
        except Exception as error:  # whatever is wrong with one request, the others go on
            logger.exception("a request could not be taken")
            self._engine.scheduler.abort(key_of(request))
            deliver(error)

    def _drop(self, key: str) -> None:
        if self._open.pop(key, None) is not None:
            self._engine.scheduler.abort(key)
