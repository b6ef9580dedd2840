"""Admission over HTTP: a real router process's app, real Redis, workers on real sockets that answer when told to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest

from penstock.common.config import RouterConfig
from penstock.common.messages import MeasuredRates
from penstock.router.app import create_app
from penstock.router.server import RouterServer
from penstock.router.service import RouterService
from tests.router.fake_worker import FakeWorker
from tests.tiny_tokenizers import byte_level

SLOW = MeasuredRates(prefill_tokens_per_s=10.0, decode_step_ms=5.0)  # a prompt of five tokens takes half a second
KEYS = ("sk-heavy", "sk-light")


class Fleet:
    """A router and one worker that computes nothing before `worker.limit` allows it."""

    def __init__(self, url: str, worker: FakeWorker, service: RouterService) -> None:
        self.worker, self.service = worker, service
        self.http = httpx.Client(base_url=url, timeout=60)
        self._threads = ThreadPoolExecutor(32)

    def ask(self, name: str, key: str = KEYS[0], **fields: Any) -> Future[httpx.Response]:
        body = {"prompt": [1, 2, 3, 4, 5], "max_tokens": 2, "seed": 0, "ignore_eos": True, **fields}
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": name}
        return self._threads.submit(self.http.post, "/v1/completions", json=body, headers=headers)

    def fill(self) -> list[Future[httpx.Response]]:
        """Three prompts are at the worker, which has more than a second of work then."""
        asked = [self.ask(f"first-{i}") for i in range(3)]
        until(lambda: len(self.worker.submitted) == 3)
        return asked

    def counters(self) -> dict[str, float]:
        lines = self.http.get("/metrics").text.splitlines()
        return {
            line.partition("{")[0].removeprefix("penstock:"): float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("penstock:")
        }

    def close(self) -> None:
        self._threads.shutdown()
        self.http.close()


def until(check: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


@pytest.fixture
def start(redis_server: Any) -> Iterator[Callable[..., Fleet]]:
    with contextlib.ExitStack() as stack:

        def begin(rates: MeasuredRates = SLOW, **options: Any) -> Fleet:
            worker = FakeWorker(redis_server.url, "d1", rates=rates)
            stack.callback(worker.close)
            worker.limit = 0
            config = RouterConfig(model="m", redis_url=redis_server.url, api_key=KEYS, **options)
            service = RouterService(config)
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            server = RouterServer(create_app(service, config, byte_level()), service, config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            fleet = Fleet(f"http://127.0.0.1:{listener.getsockname()[1]}", worker, service)
            stack.callback(fleet.close)
            stack.callback(thread.join)
            stack.callback(lambda: setattr(server, "should_exit", True))
            stack.callback(lambda: setattr(worker, "limit", 1 << 30))
            until(lambda: service.loads() and service.loads()[0][1].rates == rates)
            return fleet

        yield begin


def waits(fleet: Fleet, number: int) -> None:
    until(lambda: fleet.service.counters()["queued"] == number)


def test_a_full_fleet_serves_in_fair_shares_and_urgent_ones_first(start: Callable[..., Fleet]) -> None:
    fleet = start(api_key_weights=("1", "1"))
    asked = fleet.fill()
    for number in range(4):
        asked.append(fleet.ask(f"heavy-{number}"))
        waits(fleet, number + 1)
    asked.append(fleet.ask("light", KEYS[1]))
    waits(fleet, 5)
    asked.append(fleet.ask("urgent", priority=-1))
    waits(fleet, 6)
    assert len(fleet.worker.submitted) == 3, "nothing more is at the worker"
    fleet.worker.limit = 1 << 30
    assert [answer.result().status_code for answer in asked] == [200] * 9
    order = [request.request_id for request in fleet.worker.submitted[3:]]
    names = {answer.result().json()["id"].removeprefix("cmpl-"): answer for answer in asked}
    assert len(order) == len(set(order)) == 6 and len(names) == 9
    assert [request.priority for request in fleet.worker.submitted[3:]] == [-1, 0, 0, 0, 0, 0]
    counters = fleet.counters()
    assert counters["queued"] == 0 and counters["reserved_tokens"] == 0


def test_a_light_key_does_not_wait_for_a_heavy_one(start: Callable[..., Fleet]) -> None:
    fleet = start()
    asked = fleet.fill()
    for number in range(4):
        asked.append(fleet.ask(f"heavy-{number}", prompt=[number + 1] * 5))
        waits(fleet, number + 1)
    asked.append(fleet.ask("light", KEYS[1], prompt=[9] * 5))
    waits(fleet, 5)
    fleet.worker.limit = 1 << 30
    assert [answer.result().status_code for answer in asked] == [200] * 8
    firsts = [request.prompt_token_ids[0] for request in fleet.worker.submitted[3:]]
    assert firsts == [1, 9, 2, 3, 4]


def test_objectives_are_kept_or_refused_at_once(start: Callable[..., Fleet]) -> None:
    fleet = start(slo_ttft=900.0)
    first = fleet.ask("first")
    until(lambda: len(fleet.worker.submitted) == 1)
    late = fleet.ask("late").result()
    error = late.json()["error"]
    assert late.status_code == 429 and late.headers["retry-after"] == "1" and "x-should-retry" not in late.headers
    assert (error["type"], error["code"]) == ("rate_limit_error", "slo_unattainable") and "900 ms" in error["message"]
    hopeless = fleet.ask("hopeless", prompt=[1] * 50).result()
    assert hopeless.status_code == 429 and hopeless.headers["x-should-retry"] == "false"
    streamed = fleet.ask("streamed", stream=True).result()
    assert streamed.status_code == 429 and streamed.json()["error"]["code"] == "slo_unattainable"
    fleet.worker.limit = 1 << 30
    assert first.result().status_code == 200 and len(fleet.worker.submitted) == 1, "they were refused before any work"
    counters = fleet.counters()
    assert counters["refused_slo_total"] == 3 and counters["in_flight"] == 0


def test_tokens_that_would_come_too_slowly_are_refused(start: Callable[..., Fleet]) -> None:
    refused = start(slo_tpot=4.0).ask("slow").result()
    assert refused.status_code == 429 and "apart" in refused.json()["error"]["message"]


def test_a_full_queue_refuses_the_key_beyond_its_share(start: Callable[..., Fleet]) -> None:
    fleet = start(max_queued=2)
    asked = fleet.fill()
    asked.append(fleet.ask("heavy-0"))
    waits(fleet, 1)
    out = fleet.ask("heavy-1")
    waits(fleet, 2)
    asked.append(fleet.ask("light", KEYS[1]))
    refused = out.result()
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    fleet.worker.limit = 1 << 30
    assert [answer.result().status_code for answer in asked] == [200] * 5
    assert fleet.counters()["refused_queue_full_total"] == 1


def test_who_waits_can_leave(start: Callable[..., Fleet]) -> None:
    fleet = start()
    asked = fleet.fill()
    asked.append(fleet.ask("late"))
    waits(fleet, 1)
    with contextlib.closing(HTTPConnection(fleet.http.base_url.netloc.decode(), timeout=60)) as leaving:
        body = json.dumps({"prompt": [1, 2, 3, 4, 5], "max_tokens": 2})
        leaving.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {KEYS[1]}"})
        waits(fleet, 2)
    waits(fleet, 1)
    fleet.worker.limit = 1 << 30
    assert all(answer.result().status_code == 200 for answer in asked) and len(fleet.worker.submitted) == 4


def test_who_waits_is_told_when_it_takes_too_long(start: Callable[..., Fleet]) -> None:
    fleet = start(queue_timeout_s=1.0)
    asked = fleet.fill()
    answer = fleet.ask("late").result()
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_timeout"
    waits(fleet, 0)
    fleet.worker.limit = 1 << 30
    assert all(answer.result().status_code == 200 for answer in asked) and len(fleet.worker.submitted) == 3
