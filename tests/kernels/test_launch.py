"""Compiling without launching: whose launches are held back, and for how long."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import triton
from triton.runtime._async_compile import active_mode

from penstock.kernels import launch
from penstock.kernels.launch import compiling


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(kernel, whether it was only compiled), as Triton sees it."""
    found: list[tuple[str, bool]] = []

    def run(kernel: str, *arguments: object, grid: object, warmup: bool) -> None:
        found.append((kernel, warmup))

    monkeypatch.setattr(launch, "_LAUNCH", run)
    monkeypatch.setattr(triton.JITFunction, "run", run)
    return found


def call(kernel: str) -> None:
    triton.JITFunction.run(kernel, 1, grid=(1,), warmup=False)


def test_only_this_thread_launches_nothing(launched: list[tuple[str, bool]]) -> None:
    with ThreadPoolExecutor(1) as other:
        call("before")
        with compiling(2):
            call("within")
            other.submit(call, "beside").result()
        call("after")
    assert launched == [("before", False), ("within", True), ("beside", False), ("after", False)]


def test_launches_go_on_after_a_failure(launched: list[tuple[str, bool]]) -> None:
    with pytest.raises(RuntimeError, match="no room"), compiling(1):
        raise RuntimeError("no room")
    call("after")
    assert launched == [("after", False)]


def test_two_engines_that_start_at_once_take_turns(launched: list[tuple[str, bool]]) -> None:
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with compiling(1):
            call("second")

    with ThreadPoolExecutor(1) as other:
        with compiling(1):
            waiting = other.submit(second)
            begun.wait()
            call("first")
        waiting.result()
    call("after")
    assert launched == [("first", True), ("second", True), ("after", False)]


def test_a_kernel_that_does_not_compile_is_said_and_does_not_stop_the_next_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []

    def run(kernel: str, *arguments: object, grid: object, warmup: bool) -> None:
        mode = active_mode.get()
        assert mode is not None and warmup
        mode.submit(kernel, lambda: int(kernel), lambda result: compiled.append(str(result)))

    monkeypatch.setattr(launch, "_LAUNCH", run)
    monkeypatch.setattr(triton.JITFunction, "run", run)
    with pytest.raises(ValueError, match="invalid literal"), compiling(2):
        call("1")
        call("no number")
    with compiling(2):
        call("2")
    assert compiled == ["1", "2"]
