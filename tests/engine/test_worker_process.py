"""How a worker process ends: everything is closed, in an order in which nothing waits for what may not come."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from penstock.engine.worker_process import _take_down


class Parts:
    """What is taken down, and in which order that was; `clean`: no copy is in flight."""

    def __init__(self, clean: bool) -> None:
        self.closed: list[str] = []
        self._clean = clean

    def take_down(self) -> None:
        built: Any = SimpleNamespace(engine=self._part("engine"))
        _take_down(built, self._part("bus"), self._part("loop"), self._part("role"))

    def _part(self, name: str) -> Any:
        def close() -> bool:
            self.closed.append(name)
            return self._clean

        return SimpleNamespace(close=close)


def test_the_loop_ends_before_the_engine() -> None:
    parts = Parts(clean=True)
    parts.take_down()
    assert parts.closed == ["role", "bus", "loop", "engine"]


@pytest.mark.parametrize("failed", [False, True])
def test_with_a_copy_in_flight_neither_steps_nor_the_mover_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    def leave(status: int) -> NoReturn:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    parts = Parts(clean=False)
    with pytest.raises(SystemExit) as left:
        try:
            if failed:
                raise RuntimeError("a step failed")
        finally:
            parts.take_down()
    assert (left.value.code, parts.closed) == (int(failed), ["role", "bus"])
