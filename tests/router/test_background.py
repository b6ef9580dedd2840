"""A response in the background, between its reply, the store and who follows it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.common.errors import Unavailable
from penstock.router.responses import background
from penstock.router.responses.background import BackgroundResponse
from penstock.router.responses.following import follow
from penstock.router.responses.store import Stored, Told

Run = Callable[[Any, Any], Awaitable[None]]


class FakeStore:
    """Takes what it is told, unless it is away; `keep` waits for `may_keep`."""

    lease_s = 60.0
    leaving = False

    def __init__(self) -> None:
        self.told: list[tuple[int, bytes]] = []
        self.kept = b""
        self.wished = self.away = self.lost = False
        self.heard, self.keeping, self.may_keep = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.bell = asyncio.Event()

    async def tell(self, key: Any, streamed: bool, offset: int, piece: bytes) -> Told:
        self.heard.set()
        if self.away:
            raise Unavailable("away")
        self.told.append((offset, piece))
        return Told(self.wished, True, self.lost and offset > 0)

    async def keep(self, key: Any, stored: Stored, log: bytes, told: int) -> bool:
        self.kept = b"" if self.away else log
        self.keeping.set()
        await self.may_keep.wait()
        return bool(self.kept)

    @contextlib.asynccontextmanager
    async def wishes(self, key: Any, bell: asyncio.Event) -> AsyncIterator[None]:
        self.bell = bell
        yield


def response_of(store: FakeStore) -> BackgroundResponse:
    format: Any = SimpleNamespace(queued=lambda: b"queued\n\n", is_final=True)
    fake: Any = store
    return BackgroundResponse(("", "resp"), format, True, fake, lambda: Stored(b"body"))


def replying(run: Run) -> Any:
    return SimpleNamespace(run=run)


async def never_leaves() -> MutableMapping[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def piece(events: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": events, "more_body": more}


def test_nobody_hears_of_the_end_before_it_is_stored() -> None:
    async def run(receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send(piece(b"one\n\n"))
        await send(piece(b"two\n\nthree\n\n", more=False))

    async def check() -> None:
        store, bodies = FakeStore(), []

        async def take(message: MutableMapping[str, Any]) -> None:
            bodies.append(message.get("body", b""))

        response = response_of(store)
        await response.begin()
        response.start(replying(run))
        following = asyncio.ensure_future(follow(response, -1, never_leaves, take, []))
        await store.keeping.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        assert store.kept == b"queued\n\none\n\ntwo\n\nthree\n\n"
        assert b"".join(bodies) == b"queued\n\none\n\n" and not following.done()
        store.may_keep.set()
        await following
        await response.over()
        assert b"".join(bodies) == store.kept

    asyncio.run(check())


@pytest.mark.parametrize("comes_back", [True, False])
def test_an_end_is_held_until_redis_is_back_or_the_router_leaves(
    monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    monkeypatch.setattr(background, "AWAY_S", 0.0)

    async def run(receive: Any, send: Any) -> None:
        store.away = True
        await send(piece(b"one\n\n", more=False))

    async def check() -> None:
        store.may_keep.set()
        response = response_of(store)
        await response.begin()
        made = response.start(replying(run))
        await response.over()
        whole = b"queued\n\none\n\n"
        assert response.held and await response.read(0) == (whole, True), "who asks here is told all the same"
        for _ in range(10):
            await asyncio.sleep(0)
        assert response.held and not made.done()
        store.away, store.leaving = not comes_back, not comes_back
        await response.gone()
        assert (response.held, store.kept) == ((False, whole) if comes_back else (True, b""))

    store = FakeStore()
    asyncio.run(check())


def test_what_is_told_is_what_is_new_and_what_was_not_heard() -> None:
    events = [b"%d\n\n" % number for number in range(40)]

    async def check() -> None:
        store = FakeStore()

        async def run(receive: Any, send: Any) -> None:
            for number, event in enumerate(events):
                store.away = number in range(10, 20)
                await send(piece(event))
                if number % 10 == 5:
                    store.heard.clear()
                    await store.heard.wait()
            await send(piece(b"", more=False))

        response = response_of(store)
        store.may_keep.set()
        await response.begin()
        await response.start(replying(run))
        told = b"".join(piece for _, piece in store.told)
        assert store.kept == b"queued\n\n" + b"".join(events) and store.kept.startswith(told)
        offsets = [offset for offset, _ in store.told]
        assert offsets == [len(b"".join(piece for _, piece in store.told[:number])) for number in range(len(offsets))]
        assert len(told) >= len(b"queued\n\n" + b"".join(events[:36])) and len(store.told) < len(events)

    asyncio.run(check())


def test_what_was_lost_is_told_again_but_not_again_and_again() -> None:
    async def check() -> None:
        store = FakeStore()
        response = response_of(store)
        await response.begin()
        store.lost = True
        for _ in range(3):
            response._grow(b"more\n\n")
            await response._tell()
        first, more = b"queued\n\n", b"more\n\n"
        again = [(len(first), more), (0, first + more), (len(first + more), more), (len(first + 2 * more), more)]
        assert store.told == [(0, first), *again]

    asyncio.run(check())


def test_a_wish_is_heard_at_once() -> None:
    async def run(receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.disconnect"

    async def check() -> None:
        store = FakeStore()
        store.may_keep.set()
        response = response_of(store)
        await response.begin()
        ended = response.start(replying(run))
        store.heard.clear()
        await store.heard.wait()
        store.wished = True
        store.bell.set()  # else it would be heard when the lease is renewed
        await asyncio.wait_for(ended, 15)

    asyncio.run(check())


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 3), min_size=1, max_size=8), after=st.integers(-1, 12), fails=st.booleans())
def test_events_are_sent_from_a_number_on(sizes: list[int], after: int, fails: bool) -> None:
    numbers = iter(range(sum(sizes)))
    pieces = [b"".join(b"%d\n\n" % next(numbers) for _ in range(size)) for size in sizes]

    class Pieces:
        async def read(self, offset: int) -> tuple[bytes, bool]:
            at = next(at for at in range(len(pieces) + 1) if len(b"".join(pieces[:at])) >= offset and at >= self.seen)
            self.seen = at + 1
            if at == len(pieces):
                raise Unavailable("away")
            return pieces[at], not fails and at == len(pieces) - 1

        async def changed(self, offset: int) -> None:
            pass

        seen = 0

    async def check() -> None:
        sent: list[MutableMapping[str, Any]] = []

        async def take(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await follow(Pieces(), after, never_leaves, take, [])
        events = b"".join(message.get("body", b"") for message in sent).split(b"\n\n")[:-1]
        if fails:
            error = json.loads(events.pop().removeprefix(b"event: error\ndata: "))
            assert (error["code"], error["sequence_number"]) == ("unavailable", max(after + 1, sum(sizes)))
        assert events == [b"%d" % number for number in range(max(after + 1, 0), sum(sizes))]
        assert [message["more_body"] for message in sent[1:]] == [True] * (len(sent) - 2) + [False]

    asyncio.run(check())
