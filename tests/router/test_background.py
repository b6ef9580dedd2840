"""A response in the background, between its reply, the store and who follows it."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping, Sequence
from types import SimpleNamespace
from typing import Any

from penstock.router.responses.background import BackgroundResponse


async def _two_events(receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"one\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"two\n\nthree\n\n", "more_body": False})


def test_nobody_hears_of_the_end_before_it_is_stored() -> None:
    async def check() -> None:
        format: Any = SimpleNamespace(queued=lambda: b"queued\n\n", is_final=True)
        response = BackgroundResponse(format, True)
        storing, stored = asyncio.Event(), asyncio.Event()
        kept: list[bytes] = []
        bodies: list[bytes] = []

        async def keep(events: Sequence[bytes]) -> None:
            kept.extend(events)
            storing.set()
            await stored.wait()

        async def never_leaves() -> MutableMapping[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        async def take(message: MutableMapping[str, Any]) -> None:
            bodies.append(message.get("body", b""))

        reply: Any = SimpleNamespace(run=_two_events)
        response.start(reply, keep)
        following = asyncio.ensure_future(response.follow(-1, never_leaves, take, []))
        await storing.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        assert kept == [b"queued\n\n", b"one\n\n", b"two\n\n", b"three\n\n"]
        assert b"".join(bodies) == b"queued\n\none\n\n" and not following.done()
        stored.set()
        await following
        await response.over()
        assert b"".join(bodies) == b"".join(kept) and response.events == kept

    asyncio.run(check())
