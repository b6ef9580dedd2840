"""Requests computed together, from the first `add` to the last output: by an engine of this process, or by a fleet.

`LLM` drives one for each call. Whatever ends the block, nothing of it is left where it was computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

from penstock.answers import New
from penstock.common.messages import GenerateRequest, request_key
from penstock.engine.core import Engine
from penstock.interrupt import HeldInterrupt


class Run(Protocol):
    """Use as a context manager."""

    def __enter__(self) -> Run: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, request: GenerateRequest) -> str:
        """Begin a request; its key names its outputs."""

    def abort(self, key: str) -> None:
        """It needs no more tokens; a few may still come."""

    def outputs(self) -> Iterable[tuple[str, New]]:
        """What has come since, at least one output unless none is due; blocks. Raises what went wrong."""


def key_of(request: GenerateRequest) -> str:
    """A request's key."""
    return request_key(request.request_id, request.choice, request.attempt)


class EngineRun:
    """A run on an engine, which steps in `outputs`; Ctrl-C waits for the end of a step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open: set[str] = set()
        self._interrupt = HeldInterrupt()

    def __enter__(self) -> EngineRun:
        self._interrupt.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for key in self._open:
                self._engine.scheduler.abort(key)
            self._engine.settle()
            self._engine.pages.drain_events()  # nobody else wants to know which prefixes are here
        finally:
            self._interrupt.__exit__(kind, error, trace)

    def add(self, request: GenerateRequest) -> str:
        key = self._engine.add(request)
        self._open.add(key)
        return key

    def abort(self, key: str) -> None:
        self._open.discard(key)
        self._engine.scheduler.abort(key)

    def outputs(self) -> list[tuple[str, New]]:
        self._interrupt.deliver()
        found: list[tuple[str, New]] = []
        for output in self._engine.step().outputs:
            found.append((output.key, output))
            if output.finish is not None:
                self._open.discard(output.key)
        return found
