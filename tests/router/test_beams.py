"""Beam search over HTTP, where it has a client: what runs when it leaves. What is found: tests/system/contract."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from penstock.common.config import RouterConfig
from penstock.common.errors import PenstockError
from penstock.common.messages import GenerateRequest, TokenDelta
from penstock.router.app import create_app
from tests.router.fake_router import NO_REDIS, FakeService, say
from tests.tiny_tokenizers import byte_level

WIDTH, STEPS = 2, 50
BODY = {"model": "tiny", "prompt": "a", "max_tokens": STEPS, "n": WIDTH, "use_beam_search": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("scored", "asked"), [(1, 1), (2, 1 + WIDTH), (1 + WIDTH, 1 + WIDTH)])
def test_a_search_ends_with_its_client(scored: int, asked: int, stream: bool) -> None:
    """Also when it leaves with the last score of a step: then nothing is being scored that could be cancelled."""

    async def scenario() -> tuple[FakeService, list[Any]]:
        left = asyncio.get_running_loop().create_future()

        def script(request: GenerateRequest) -> list[TokenDelta | PenstockError]:
            played.append(request)
            if len(played) == scored:
                left.set_result({"type": "http.disconnect"})
            return say("a")(request)

        async def receive() -> Any:
            return told.pop() if told else await left

        async def send(message: Any) -> None:
            sent.append(message)

        service, played, sent = FakeService(), list[GenerateRequest](), list[Any]()
        service.script = script
        await service.start()
        told = [{"type": "http.request", "body": json.dumps({**BODY, "stream": stream}).encode()}]
        config = RouterConfig(served_model_name=("tiny",), redis_url=NO_REDIS)
        app = create_app(service, config, byte_level())  # type: ignore[arg-type]
        await app({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)
        await service.stop(60.0)
        return service, sent

    service, sent = asyncio.run(scenario())
    assert len(service.requests) == asked and not sent
