"""Links to lenders over real sockets: a busy one is waited for, one that is not there is not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest
import zmq
from msgspec.structs import replace

from penstock.common import bus
from penstock.common.bus import BusServer, Peers
from penstock.common.messages import AnyMessage, Goodbye, Heartbeat, HeartbeatAck, Hello, PagesLanded, WorkerLoad
from penstock.kv_transfer.leases import CLOCKS_AGREE
from penstock.kv_transfer.peer_links import LinkEvent, PeerFound, PeerLinks, PeerLost
from tests.kv_transfer.noting import nixl_worker

LEASE_S = 7.0


@pytest.fixture
def links() -> Iterator[PeerLinks]:
    opened = PeerLinks("decode-0", "decode", "f", "", zmq.Poller())
    yield opened
    opened.close()


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_worker_that_computes_is_waited_for_and_its_answers_prove_its_own_lease(links: PeerLinks) -> None:
    server = BusServer("127.0.0.1", 0, "")
    try:
        worker = replace(nixl_worker("prefill-0", "p1"), address=server.address, lease_s=LEASE_S)
        peers = Peers(worker, LEASE_S)
        links.send(worker, PagesLanded(request_id="r", attempt=0), 0.0)
        got: list[AnyMessage] = []
        events: list[LinkEvent] = []
        for now in range(60):  # it is in a long step, and says nothing
            assert links.poll(float(now)) == [] and links.leased_until("p1") == float("-inf")

        def turn() -> None:
            for identity, message in server.receive():
                if isinstance(message, Hello):
                    server.send(identity, peers.hello(identity, message, 60.0)[0])
                elif isinstance(message, Heartbeat):
                    server.send(identity, HeartbeatAck(seq=message.seq, load=WorkerLoad()))
                else:
                    got.append(message)
            events.extend(event for _, event in links.poll(61.0))

        def both() -> bool:
            turn()
            return bool(got) and links.leased_until("p1") > 60.0

        _until(both)
        assert isinstance(events[0], PeerFound) and got == [PagesLanded(request_id="r", attempt=0)]
        assert links.leased_until("p1") == 61.0 + LEASE_S * CLOCKS_AGREE
        asked = links.ask("p1", 61.0)  # at once, though no heartbeat is due
        assert links.proven("p1") < asked

        def answered() -> bool:
            turn()
            return links.proven("p1") >= asked

        _until(answered)
    finally:
        server.close()


def test_an_answer_that_is_there_at_once_is_not_missed(links: PeerLinks, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the handshake may be over before the thread that began it goes on."""
    server = BusServer("127.0.0.1", 0, "")
    try:
        worker = replace(nixl_worker("prefill-0", "p1"), address=server.address, lease_s=LEASE_S)
        peers = Peers(worker, LEASE_S)
        receive = bus.BusLink.receive

        def receive_late(link: bus.BusLink, now: float) -> list[bus.LinkItem]:
            items = receive(link, now)
            while not items and not peers:
                for identity, message in server.receive():
                    assert isinstance(message, Hello)
                    server.send(identity, peers.hello(identity, message, now)[0])
            while not items:
                items = receive(link, now)
            return items

        monkeypatch.setattr(bus.BusLink, "receive", receive_late)
        links.send(worker, PagesLanded(request_id="r", attempt=0), 1.0)
        monkeypatch.undo()
        assert links.leased_until("p1") == 1.0 + LEASE_S * CLOCKS_AGREE  # by its Welcome
        assert [(name, type(event)) for name, event in links.poll(2.0)][:1] == [("p1", PeerFound)]
    finally:
        server.close()


def test_whoever_takes_a_connection_and_never_speaks_is_lost(links: PeerLinks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process: the kernel accepts for it. libzmq gives up a handshake that does not get on."""
    monkeypatch.setattr(bus, "CONNECT_TIMEOUT_MS", 100)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        worker = replace(nixl_worker("prefill-0", "p1"), address=address)
        links.send(worker, PagesLanded(request_id="r", attempt=0), 0.0)
        events: list[tuple[str, LinkEvent]] = []

        def lost() -> bool:
            events.extend(links.poll(1.0))
            return bool(events)

        _until(lost)
        assert [(name, type(event)) for name, event in events] == [("p1", PeerLost)] and len(links) == 0


@pytest.mark.parametrize("first", ["lender", "reader"])
def test_whoever_leaves_first_says_so(links: PeerLinks, caplog: pytest.LogCaptureFixture, first: str) -> None:
    caplog.set_level("INFO")
    server = BusServer("127.0.0.1", 0, "")
    try:
        worker = replace(nixl_worker("prefill-0", "p1"), address=server.address)
        peers = Peers(worker, LEASE_S)
        links.send(worker, PagesLanded(request_id="r", attempt=0), 0.0)
        got: list[AnyMessage] = []

        def met() -> bool:
            for identity, message in server.receive():
                got.append(message)
                if isinstance(message, Hello):
                    server.send(identity, peers.hello(identity, message, 1.0)[0])
            links.poll(1.0)
            return PagesLanded(request_id="r", attempt=0) in got

        _until(met)
        if first == "reader":
            links.close()
            _until(lambda: Goodbye() in [message for _, message in server.receive()])
        else:
            for identity in peers:
                server.send(identity, Goodbye())
            server.close()
            _until(lambda: bool(links.poll(1.0)))
            assert len(links) == 0
            told = [record for record in caplog.records if "prefill-0" in record.message]
            assert [record.levelname for record in told] == ["INFO"] and "has left" in told[0].message
    finally:
        server.close()
