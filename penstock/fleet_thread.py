"""A fleet of worker processes for one Python program: the workers are children, their router is a thread of it.

The same launcher as `penstock serve`'s and the same router, without HTTP between: tokens, scores and spans come as the
workers send them. `LLM(model, prefill_workers=1)` and `AsyncLLM` use it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from types import TracebackType

from penstock.answers import New
from penstock.common.config import ServeConfig
from penstock.common.errors import PenstockError
from penstock.common.messages import GenerateRequest, TokenDelta
from penstock.common.tasks import begun
from penstock.engine_run import key_of
from penstock.fleet import WITHOUT_LIMITS, Fleet
from penstock.router.service import ModelInfo, RouterService
from penstock.router.slices import Slices

Deliver = Callable[[New | Exception], None]
LINK_TIMEOUT_S = 60.0  # from workers that are registered to links to all of them
STOP_TIMEOUT_S = 10.0


class FleetThread:
    """The fleet that `config` describes, started; `close` ends every process.

    Raises:
        ConfigError, LaunchError: a worker cannot be started; nothing is left running.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._pid = os.getpid()
        self._fleet = Fleet(replace(config, **WITHOUT_LIMITS), with_router=False)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="fleet router", daemon=True)
        self._service: RouterService | None = None
        self._closed = False
        self._closing = Lock()  # of `_closed`: what is asked for before it is set reaches the router before its end
        self._asked: Slices[Callable[[], None]] = Slices(lambda do: do())  # in the order in which it was asked for
        self.error: Exception | None = None  # as EngineThread's; lost workers are started again
        self._thread.start()
        try:
            self._fleet.start()
            self._fleet.wait_ready()
            self._service = asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()
        except BaseException:
            self.close()
            raise

    @property
    def fleet(self) -> Fleet:
        """Its processes."""
        return self._fleet

    @property
    def model(self) -> ModelInfo:
        """The model, as its workers describe it."""
        info = self._running.model_info()
        assert info is not None, "the constructor waits for workers"
        return info

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        """Have it computed; `deliver` gets its tokens, or the error that ended it, on this object's thread.

        Raises:
            ValueError: `close` was called, or it is another process's.
        """
        with self._closing:
            self._loop.call_soon_threadsafe(self._asked.add, partial(_submit, self._running, request, deliver))

    def abort(self, request: GenerateRequest) -> None:
        """It needs no more tokens; a few may still come. After `close`, or while it ends requests: nothing."""
        with self._closing:
            if self._service is not None and not self._closed and not self._forked:
                cancel = partial(self._service.cancel, request.request_id, request.choice)
                self._loop.call_soon_threadsafe(self._asked.add, cancel)

    def close(self) -> None:
        """End requests, links, workers and Redis; returns when no process is left. Again, or in a fork: nothing."""
        if self._forked:
            return
        with self._closing:
            closed, self._closed = self._closed, True
        if closed:
            return
        try:
            if self._service is not None:
                stop = asyncio.run_coroutine_threadsafe(self._stop(self._service), self._loop)
                stop.exception(STOP_TIMEOUT_S)  # at the interpreter's exit it cannot end everything: the exit does
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._fleet.stop()

    def check_open(self) -> None:
        """Raises ValueError as `submit`."""
        _ = self._running

    @property
    def _running(self) -> RouterService:
        if self._forked:
            raise ValueError("it belongs to the process that made it: this one is a fork, without its threads")
        if self._service is None or self._closed:
            raise ValueError("it is closed")
        return self._service

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._pid

    async def _stop(self, service: RouterService) -> None:
        await service.stop(0.0)
        while self._asked:  # which are refused now
            await asyncio.sleep(0)

    async def _connect(self) -> RouterService:
        config = self._fleet.config
        service = RouterService(config.router())
        await service.start()
        wanted = {"prefill": config.prefill_workers, "decode": config.decode_workers}
        deadline = time.monotonic() + LINK_TIMEOUT_S
        while True:
            linked = Counter(worker.role for worker, _ in service.loads())
            if all(linked[role] >= count for role, count in wanted.items()) and service.model_info() is not None:
                return service
            if time.monotonic() > deadline:
                await service.stop(0.0)
                raise TimeoutError(f"linked to {dict(linked)} of {wanted} workers after {LINK_TIMEOUT_S:g} s")
            await asyncio.sleep(0.02)


class FleetRun:
    """A run on a fleet; see `Run`."""

    def __init__(self, thread: FleetThread) -> None:
        self._thread = thread
        self._open: dict[str, GenerateRequest] = {}
        self._inbox: SimpleQueue[tuple[str, New | Exception]] = SimpleQueue()

    def __enter__(self) -> FleetRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in list(self._open):
            self.abort(key)

    def add(self, request: GenerateRequest) -> str:
        key = key_of(request)
        self._open[key] = request
        self._thread.submit(request, partial(self._put, key))
        return key

    def abort(self, key: str) -> None:
        request = self._open.pop(key, None)
        if request is not None:
            self._thread.abort(request)

    def outputs(self) -> list[tuple[str, New]]:
        while True:
            key, new = self._inbox.get()
            if key not in self._open:
                continue  # a token of one that was aborted
            if isinstance(new, Exception):
                del self._open[key]
                raise new
            if new.finish is not None:
                del self._open[key]
            return [(key, new)]

    def _put(self, key: str, new: New | Exception) -> None:
        self._inbox.put((key, new))


class _Sink:
    """What the router tells of one choice."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver

    def on_delta(self, delta: TokenDelta) -> None:
        self._deliver(delta)

    def on_error(self, error: PenstockError) -> None:
        self._deliver(error)


def _submit(service: RouterService, request: GenerateRequest, deliver: Deliver) -> None:
    """Here and now: a task of its own might begin after the request has been given up."""
    try:
        begun(service.submit(request, _Sink(deliver)))
    except Exception as error:  # instead of taking it: nobody else would hear of it
        deliver(error)
