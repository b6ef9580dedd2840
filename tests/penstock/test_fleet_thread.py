"""`FleetThread` without processes: what goes wrong with a request reaches whoever asked; a fork has nothing of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread

import pytest

from penstock import SamplingParams
from penstock.common.config import ServeConfig
from penstock.common.messages import GenerateRequest
from penstock.fleet_thread import FleetRun, FleetThread
from penstock.router.service import Sink

REQUEST = GenerateRequest(request_id="r", choice=0, prompt_token_ids=[1], sampling=SamplingParams())
WAIT_S = 60.0


class _Processes:
    """In the place of `Fleet`."""

    def __init__(self, config: ServeConfig, *, with_router: bool) -> None:
        self.config = config
        self.stopped = 0

    def start(self) -> None:
        pass

    def wait_ready(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped += 1


class _Router:
    """In the place of `RouterService`: takes nothing."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def submit(self, request: GenerateRequest, sink: Sink) -> None:
        self.asked.append("submit")
        raise OverflowError("Integer value out of range")

    def cancel(self, request_id: str, choice: int) -> None:
        self.asked.append("cancel")

    async def stop(self, grace_s: float) -> None:
        pass


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[FleetThread]:
    async def connect(self: FleetThread) -> _Router:
        return _Router()

    monkeypatch.setattr("penstock.fleet_thread.Fleet", _Processes)
    monkeypatch.setattr(FleetThread, "_connect", connect)
    thread = FleetThread(ServeConfig(model="m"))
    yield thread
    thread.close()
    assert not thread._thread.is_alive() and thread._fleet.stopped == 1  # type: ignore[attr-defined]


def test_what_the_router_raises_reaches_whoever_asked(thread: FleetThread) -> None:
    told: SimpleQueue[object] = SimpleQueue()
    thread.submit(REQUEST, told.put)
    assert isinstance(told.get(timeout=WAIT_S), OverflowError)
    with FleetRun(thread) as run:
        run.add(REQUEST)
        with pytest.raises(OverflowError, match="out of range"):
            run.outputs()


def test_a_request_that_is_given_up_at_once_is_given_up(thread: FleetThread) -> None:
    """Its end came before it: so it was computed whole, for nobody."""
    busy, told = Event(), SimpleQueue[object]()
    thread._loop.call_soon_threadsafe(busy.wait)
    thread.submit(REQUEST, lambda new: None)
    thread.abort(REQUEST)
    thread.submit(REQUEST, told.put)
    busy.set()
    told.get(timeout=WAIT_S)
    assert thread._service.asked == ["submit", "cancel", "submit"]  # type: ignore[union-attr]


def test_a_fork_is_refused_and_ends_nothing(thread: FleetThread, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        with FleetRun(thread) as run, pytest.raises(ValueError, match="this one is a fork"):
            run.add(REQUEST)
        for refused in (thread.check_open, lambda: thread.model):
            with pytest.raises(ValueError, match="this one is a fork"):
                refused()
        thread.close()
    assert thread._thread.is_alive() and thread._fleet.stopped == 0  # type: ignore[attr-defined]


def test_what_is_asked_for_while_it_closes_is_answered(thread: FleetThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller waits for that."""
    call, closing, told = thread._loop.call_soon_threadsafe, Thread(target=thread.close), SimpleQueue[object]()

    def late(*given: object) -> object:
        monkeypatch.undo()
        closing.start()
        closing.join(0.2)
        return call(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(thread._loop, "call_soon_threadsafe", late)
    thread.submit(REQUEST, told.put)
    closing.join()
    assert isinstance(told.get(timeout=WAIT_S), OverflowError)


def test_after_its_end_it_is_refused(thread: FleetThread) -> None:
    thread.close()
    with pytest.raises(ValueError, match="it is closed"):
        thread.submit(REQUEST, lambda new: None)
