"""A router that has just started: who comes before its first worker waits for it, as for one that comes back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from penstock.common.config import RouterConfig
from penstock.common.errors import Unavailable
from penstock.router import first_worker
from penstock.router.app import create_app
from penstock.router.first_worker import FirstWorker
from penstock.router.server import RouterServer
from penstock.router.service import RouterService
from tests.router.fake_worker import FakeWorker
from tests.tiny_tokenizers import byte_level

PROMPT = {"prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": True}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", PROMPT),
    ("/v1/completions", PROMPT | {"stream": True}),
    ("/tokenize", {"prompt": "a"}),
]


def until(check: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


@contextlib.contextmanager
def router(redis_url: str, **options: Any) -> Iterator[tuple[httpx.Client, RouterService, RouterServer]]:
    config = RouterConfig(model="m", redis_url=redis_url, **options)
    service = RouterService(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = RouterServer(create_app(service, config, byte_level()), service, config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as http:
                yield http, service, server
        finally:
            server.should_exit = True
            thread.join()
    assert service.first_worker.waiting == 0


def test_the_first_worker_is_waited_for(redis_server: Any) -> None:
    with router(redis_server.url) as (http, service, server), ThreadPoolExecutor(len(BODIES)) as threads:
        asked = [threads.submit(http.post, path, json=body) for path, body in BODIES]
        until(lambda: service.first_worker.waiting == len(BODIES))
        assert http.get("/health").status_code == 503
        wrong = http.post("/v1/completions", json={"prompt": [1], "max_tokens": "many"})  # is told so at once
        assert wrong.status_code == 400
        with socket.create_connection(("127.0.0.1", http.base_url.port or 0)) as client:
            client.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 15\r\n\r\n{"prompt": "a"}')
            until(lambda: service.first_worker.waiting == len(BODIES) + 1)
        until(lambda: service.first_worker.waiting == len(BODIES))  # that client has left
        worker = FakeWorker(redis_server.url, "d1")
        try:
            answers = [answer.result() for answer in asked]
            assert [answer.status_code for answer in answers] == [200] * len(BODIES)
            assert answers[1].text.endswith("data: [DONE]\n\n") and len(worker.submitted) == 2
            until(lambda: not server.server_state.tasks)
        finally:
            worker.close()


def test_nobody_waits_for_ever(redis_server: Any) -> None:
    with router(redis_server.url, queue_timeout_s=0.2) as (http, _, _):
        for path, body in BODIES:
            answer = http.post(path, json=body)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"
            assert answer.json()["error"]["message"] == "no worker came up within 0 s: no worker is known yet"
            assert answer.headers["retry-after"]


def test_who_waits_is_told_of_the_end(redis_server: Any) -> None:
    with ThreadPoolExecutor(1) as threads, router(redis_server.url) as (http, service, server):
        asked = threads.submit(http.post, "/v1/completions", json=PROMPT)
        until(lambda: service.first_worker.waiting == 1)
        server.should_exit = True
        answer = asked.result()
        assert answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]


def test_not_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_worker, "MAX_WAITING", 3)

    async def check() -> None:
        first = FirstWorker(60.0)
        waiting = [asyncio.ensure_future(first.wait("none")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="too many"):
            await first.wait("none")
        first.has_come()
        await asyncio.gather(*waiting)
        await first.wait("none")  # nobody waits any more
        assert first.waiting == 0

    asyncio.run(check())
