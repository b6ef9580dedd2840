"""What streams write, and when: one write a turn of the loop, whatever a client's reading holds up."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from penstock.router.event_stream import EventStream, Outbox


class Client:
    """Takes bodies as a server's `send` does; while it is `slow`, a send waits until `read` is set."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.complete = False
        self.slow = False
        self.read = asyncio.Event()
        self.error: Exception | None = None

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self.slow:
            await self.read.wait()
        if self.error is not None:
            raise self.error
        assert not self.complete
        self.bodies.append(message["body"])
        self.complete = not message["more_body"]


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def test_all_events_of_a_turn_are_one_write() -> None:
    async def check() -> None:
        outbox, client = Outbox(), Client()
        stream = EventStream(outbox)
        stream.put(b"a")
        stream.put(b"b")
        running = asyncio.ensure_future(stream.run(client.send))
        await turns()
        assert client.bodies == [b"ab"] and not running.done()
        for event in (b"c", b"d", b"e"):
            stream.put(event)
        await turns()
        stream.put(b"f", last=True)
        await running
        assert client.bodies == [b"ab", b"cde", b"f"] and client.complete

    asyncio.run(check())


def test_streams_are_written_in_the_order_in_which_they_had_news() -> None:
    async def check() -> None:
        outbox, client = Outbox(), Client()
        streams = [EventStream(outbox) for _ in range(3)]
        running = [asyncio.ensure_future(stream.run(client.send)) for stream in streams]
        await turns()
        for place in (2, 0, 1):
            streams[place].put(b"%d" % place)
        await turns()
        assert client.bodies == [b"2", b"0", b"1"]
        for stream in streams:
            stream.give_up()
        await asyncio.gather(*running)

    asyncio.run(check())


@pytest.mark.parametrize("last", [False, True])
def test_a_slow_client_holds_up_nobody_and_misses_nothing(last: bool) -> None:
    async def check() -> None:
        outbox, slow, quick = Outbox(), Client(), Client()
        one, other = EventStream(outbox), EventStream(outbox)
        running = [asyncio.ensure_future(one.run(slow.send)), asyncio.ensure_future(other.run(quick.send))]
        await turns()
        slow.slow = True
        one.put(b"1", last=last)
        other.put(b"x")
        await turns()
        assert slow.bodies == [] and quick.bodies == [b"x"]
        if not last:
            one.put(b"2")
            one.put(b"3", last=True)
        other.put(b"y", last=True)
        await running[1]
        assert quick.bodies == [b"x", b"y"] and not running[0].done()
        slow.read.set()
        await running[0]
        assert slow.bodies == ([b"1"] if last else [b"1", b"23"]) and slow.complete

    asyncio.run(check())


def test_what_send_raises_ends_the_answer() -> None:
    async def check(slow: bool) -> None:
        client = Client()
        stream = EventStream(Outbox())
        running = asyncio.ensure_future(stream.run(client.send))
        await turns()
        client.error, client.slow = OSError("cut"), slow
        stream.put(b"a")
        await turns()
        client.read.set()
        with pytest.raises(OSError, match="cut"):
            await running
        stream.put(b"b", last=True)
        await turns()
        assert client.bodies == []

    asyncio.run(check(slow=False))
    asyncio.run(check(slow=True))


def test_a_stream_that_is_given_up_writes_nothing_more() -> None:
    async def check() -> None:
        client, early = Client(), EventStream(Outbox())
        early.give_up()  # before its status was out
        await early.run(client.send)
        stream = EventStream(Outbox())
        running = asyncio.ensure_future(stream.run(client.send))
        await turns()
        stream.put(b"a")  # in the outbox when its client leaves
        stream.give_up()
        await running
        await turns()
        assert client.bodies == []

    asyncio.run(check())


def test_a_cancelled_answer_leaves_nothing_behind() -> None:
    async def check() -> None:
        client = Client()
        stream = EventStream(Outbox())
        running = asyncio.ensure_future(stream.run(client.send))
        await turns()
        client.slow = True
        stream.put(b"a")
        await turns()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        client.read.set()
        stream.put(b"b")
        await turns()
        assert client.bodies == [] and len(asyncio.all_tasks()) == 1

    asyncio.run(check())


def test_what_has_ended_is_written_to_its_end() -> None:
    async def check() -> None:
        client = Client()
        stream = EventStream(Outbox())
        running = asyncio.ensure_future(stream.run(client.send))
        await turns()
        stream.put(b"a", last=True)
        stream.give_up()  # too late: a response in the background must not lose how it ended
        await running
        assert client.bodies == [b"a"] and client.complete

    asyncio.run(check())
