"""The bus over real sockets on loopback, and who is joined to a worker with a clock of its own."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from penstock.common import bus, bus_access
from penstock.common.bus import (
    AsyncBusLink,
    BusLink,
    BusServer,
    Connected,
    Disconnected,
    LinkItem,
    PeerExpired,
    PeerJoined,
    PeerReplaced,
    Peers,
    split_identity,
    wire_identity,
)
from penstock.common.errors import ConfigError
from penstock.common.messages import (
    PROTOCOL_VERSION,
    Abort,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Refused,
    TokenBatch,
    TokenDelta,
    Welcome,
    WorkerLoad,
    encode,
)
from tests.worker_info import worker_info

WORKER = worker_info()
WELCOME = Welcome(protocol=PROTOCOL_VERSION, fingerprint="f", worker=encode(WORKER))


def hello(
    peer: str = "r", session: int = 1, role: str = "router", fingerprint: str = "", protocol: int = PROTOCOL_VERSION
) -> Hello:
    return Hello(protocol=protocol, peer_id=peer, session=session, role=role, fingerprint=fingerprint)


# ---------------------------------------------------------------- Peers


def greet(peers: Peers, message: Hello, now: float = 0.0) -> Any:
    return peers.hello(wire_identity(message.peer_id, message.session), message, now)


def test_identity_on_the_wire():
    assert wire_identity("a/b", 12) == b"a/b/12" and split_identity(b"a/b/12") == ("a/b", 12)
    for wrong in (b"nobody", b"a/x"):
        with pytest.raises(ValueError, match=r"identity|invalid literal"):
            split_identity(wrong)
    with pytest.raises(ValueError, match="too long"):
        wire_identity("x" * 255, 1)


def test_a_peer_joins_renews_and_expires():
    peers = Peers(WORKER, lease_s=10.0)
    answer, events = greet(peers, hello())
    assert answer == WELCOME and events == [PeerJoined(b"r/1", "r", "router")]
    assert b"r/1" in peers and peers.identity_of("r") == b"r/1" and peers.role(b"r/1") == "router"
    assert peers.heartbeat(b"r/1", now=8.0) and peers.leases(9.5) == {"r/1": 8.5}
    assert peers.expire(18.0) == []
    assert peers.expire(18.1) == [PeerExpired(b"r/1", "r")]
    assert len(peers) == 0 and peers.identity_of("r") is None
    assert not peers.heartbeat(b"r/1", now=18.2), "it has to say Hello again"


def test_a_peer_that_says_goodbye_is_forgotten_at_once():
    peers = Peers(WORKER, lease_s=10.0)
    greet(peers, hello())
    greet(peers, hello("s"))
    assert list(peers) == [b"r/1", b"s/1"] and peers.left(b"r/1") == "r"
    assert list(peers) == [b"s/1"] and peers.identity_of("r") is None
    assert greet(peers, hello())[1] == [PeerJoined(b"r/1", "r", "router")], "it may come back"


def test_a_newer_session_replaces_and_an_older_one_is_refused():
    peers = Peers(WORKER, lease_s=10.0)
    greet(peers, hello(session=2))
    answer, events = greet(peers, hello(session=3))
    assert isinstance(answer, Welcome)
    assert events == [PeerReplaced(b"r/2", "r"), PeerJoined(b"r/3", "r", "router")]
    assert b"r/2" not in peers and not peers.heartbeat(b"r/2", 1.0)
    answer, events = greet(peers, hello(session=2))
    assert isinstance(answer, Refused) and events == [] and peers.identity_of("r") == b"r/3"
    assert greet(peers, hello(session=3))[1] == [], "the same Hello again changes nothing"
    assert peers.expire(10.1) == [PeerExpired(b"r/3", "r")] and len(peers) == 0


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (hello(protocol=99), "protocol"),
        (hello(role="decode", fingerprint="g"), "fingerprint"),
        (hello(role="decode", fingerprint=""), "fingerprint"),
        (hello(role="router", fingerprint="g"), "fingerprint"),
    ],
)
def test_refusals(message: Hello, code: str):
    peers = Peers(WORKER, lease_s=10.0)
    answer, events = greet(peers, message)
    assert isinstance(answer, Refused) and answer.code == code and events == [] and len(peers) == 0


def test_a_draining_worker_takes_nobody_new():
    peers = Peers(WORKER, lease_s=10.0)
    greet(peers, hello("old"))
    peers.draining = True
    assert greet(peers, hello("new"))[0].code == "draining"
    assert peers.heartbeat(b"old/1", 5.0)


def test_an_identity_that_is_not_the_peers_own_is_refused():
    for said in (hello(), hello("x" * 300)):  # ZeroMQ takes no identity as long as that
        assert Peers(WORKER, 10.0).hello(b"other/1", said, 0.0)[0].code == "protocol"  # type: ignore[union-attr]


# ---------------------------------------------------------------- sockets


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    one: zmq.Context[Any] = zmq.Context()
    yield one
    one.term()  # blocks, and so fails by timeout, if a test leaves a socket open


class Pair:
    """A server with its peers, and a link to it, driven by one thread."""

    def __init__(self, context: zmq.Context[Any], key: str = "", link_key: str | None = None, port: int = 0) -> None:
        self.server = BusServer("127.0.0.1", port, key)
        self.peers = Peers(WORKER, 10.0)
        self.poller = zmq.Poller()
        link_key = key if link_key is None else link_key
        self.link = BusLink(self.server.address, "r", "router", 1, "", link_key, context, poller=self.poller)
        self.at_link: list[LinkItem] = []
        self.at_server: list[tuple[bytes, Any]] = []

    def until(self, check: Callable[[], Any], limit_s: float = 60.0) -> None:
        deadline = time.monotonic() + limit_s
        while not check():
            assert time.monotonic() < deadline, (self.at_link, self.at_server)
            self.at_link += self.link.receive(time.monotonic())
            for identity, message in [] if self.server.socket.closed else self.server.receive():
                self.at_server.append((identity, message))
                if isinstance(message, Hello):
                    self.server.send(identity, self.peers.hello(identity, message, time.monotonic())[0])
                elif isinstance(message, Heartbeat):
                    self.server.send(identity, HeartbeatAck(seq=message.seq, load=WorkerLoad(running=1)))
            self.poller.poll(5)

    def connect(self) -> Pair:
        self.until(lambda: any(isinstance(item, Connected) for item in self.at_link))
        return self

    def close(self) -> None:
        self.link.close()
        self.server.close()
        assert self.poller.sockets == []


@pytest.mark.parametrize("key", ["", "a secret"])
def test_messages_both_ways(context: zmq.Context[Any], key: str):
    pair = Pair(context, key).connect()
    assert pair.link.connected and len(pair.poller.sockets) == 2
    pair.until(lambda: any(isinstance(item, HeartbeatAck) for item in pair.at_link))
    assert pair.link.send(Abort(request_id="x", attempt=3))
    pair.until(lambda: (b"r/1", Abort(request_id="x", attempt=3)) in pair.at_server)
    batches = [TokenBatch(deltas=[TokenDelta("x", 0, 0, i, [i])]) for i in range(1000)]
    for batch in batches:
        pair.server.send(b"r/1", batch)
    pair.until(lambda: len(pair.at_link) >= 1002)
    assert [item for item in pair.at_link if isinstance(item, TokenBatch)] == batches
    pair.close()


@pytest.mark.parametrize(("key", "link_key"), [("a secret", ""), ("a secret", "another secret"), ("", "a secret")])
def test_with_another_cluster_key_nobody_comes_in_and_is_told(context: zmq.Context[Any], key: str, link_key: str):
    pair = Pair(context, key, link_key)
    server_socket = pair.server.socket
    pair.until(lambda: pair.at_link)
    (end,) = pair.at_link
    assert isinstance(end, Disconnected) and end.refused and "cluster key" in end.reason
    assert pair.at_server == [] and not pair.link.connected and not server_socket.closed
    pair.close()


def test_the_address_must_be_safe(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="cluster_key"):
        BusServer("0.0.0.0", 0, "")
    with pytest.raises(ConfigError, match="resolved"):
        BusServer("no-such-host.invalid", 0, "key")
    server = BusServer("localhost", 0, "")
    assert server.address.startswith("tcp://localhost:")
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match="cannot bind"):
        BusServer("127.0.0.1", port, "")
    server.close()
    server.close()
    own = {"0.0.0.0": "0.0.0.0", socket.gethostname(): "10.1.2.3"}
    monkeypatch.setattr(bus_access, "_address_of", lambda host: ipaddress.ip_address(own[host]))
    assert bus_access.resolve_bind("0.0.0.0", "key") == ("0.0.0.0", "10.1.2.3")
    own[socket.gethostname()] = "127.0.1.1"
    with pytest.raises(ConfigError, match="peers reach"):
        bus_access.resolve_bind("0.0.0.0", "key")


def test_rubbish_is_answered_and_counted(context: zmq.Context[Any], caplog: pytest.LogCaptureFixture):
    server = BusServer("127.0.0.1", 0, "")
    raw = context.socket(zmq.DEALER)
    raw.connect(server.address)
    for frames in ([b"\xc1"], [b""], [b"a", b"b"], [b"\x91" * 100_000], [encode(Heartbeat(seq=1))]):
        raw.send_multipart(frames)
    received: list[Any] = []
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        server.socket.poll(100)
        received += server.receive()
    assert [message for _, message in received] == [Heartbeat(seq=1)] and server.undecodable == 4
    assert len(caplog.records) == 1, "the log is rate-limited"
    assert raw.poll(5000) and b"refused" in raw.recv()
    raw.close(0)
    server.close()


def test_sending_to_a_peer_that_is_gone_is_counted(context: zmq.Context[Any]):
    pair = Pair(context).connect()
    pair.server.send(b"nobody/1", Heartbeat(seq=1))
    assert pair.server.dropped_sends == 1
    pair.close()


def test_a_link_outlives_its_worker(context: zmq.Context[Any]):
    pair = Pair(context).connect()
    pair.until(lambda: isinstance(pair.at_link[-1], HeartbeatAck))
    pair.server.send(b"r/1", Abort(request_id="last", attempt=0))
    assert pair.link.sockets[0].poll(60_000), "it has left before the socket goes"
    pair.server.close()
    pair.until(lambda: isinstance(pair.at_link[-1], Disconnected))
    assert Abort(request_id="last", attempt=0) in pair.at_link, "what came before the cut is read"
    assert not pair.link.send(Heartbeat(seq=9)) and pair.link.dropped_sends == 1
    port = int(pair.server.address.rpartition(":")[2])
    pair.server, pair.peers = BusServer("127.0.0.1", port, ""), Peers(WORKER, 10.0)
    pair.at_link.clear()
    pair.connect()
    session = pair.link.state.session
    assert session > 1 and pair.peers.identity_of("r") == wire_identity("r", session)
    pair.close()


def test_a_router_that_stood_still_does_not_wait_to_be_told(context: zmq.Context[Any]):
    """A worker that computes says late that it has ended the session: what goes there meanwhile would be lost."""
    pair = Pair(context).connect()
    pair.until(lambda: isinstance(pair.at_link[-1], HeartbeatAck))
    pair.server.send(b"r/1", Abort(request_id="last", attempt=0))
    assert pair.link.sockets[0].poll(60_000)
    awake = time.monotonic() + WORKER.lease_s + 60.0
    last, end = pair.link.receive(awake)
    assert last == Abort(request_id="last", attempt=0), "what came before is read"
    assert isinstance(end, Disconnected) and end.greeted and not pair.link.connected
    assert pair.link.receive(awake + 60.0) == [] and pair.link.state.session == 2, "the next session begins"
    pair.close()


@pytest.mark.parametrize("key", ["", "a secret"])
def test_whoever_closes_says_goodbye_and_it_arrives(context: zmq.Context[Any], key: str):
    """Sockets close right behind it, each time: the message must be out before."""
    for _ in range(20):
        pair = Pair(context, key).connect()
        pair.link.close()
        pair.until(lambda pair=pair: (b"r/1", Goodbye()) in pair.at_server)
        pair.close()
        pair = Pair(context, key).connect()
        pair.server.send(b"r/1", Goodbye())
        pair.server.close()
        pair.until(lambda pair=pair: isinstance(pair.at_link[-1], Disconnected))
        assert pair.at_link[-1].left
        pair.close()


def test_a_link_that_was_never_greeted_closes_without_a_word(context: zmq.Context[Any]):
    server = BusServer("127.0.0.1", 0, "")
    link = BusLink(server.address, "r", "router", 1, "", "", context)
    assert link.receive(0.0) == [] and server.socket.poll(60_000)
    link.close()
    assert [type(message) for _, message in server.receive()] == [Hello]
    server.close()


def test_nobody_listens(context: zmq.Context[Any]):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        link = BusLink(f"tcp://127.0.0.1:{unused.getsockname()[1]}", "r", "router", 1, "", "", context)
        items: list[LinkItem] = []
        deadline = time.monotonic() + 60
        while len(items) < 3 and time.monotonic() < deadline:
            items += link.receive(time.monotonic())
            time.sleep(0.01)
        link.close()
    assert [item.session for item in items if isinstance(item, Disconnected)] == [1, 2, 3]


@pytest.mark.parametrize("read_bytes", [bus.READ_BYTES, 1])
def test_the_same_on_asyncio(context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch, read_bytes: int):
    """However little is read in one pass of the loop, everything is, in order."""
    monkeypatch.setattr(bus, "READ_BYTES", read_bytes)
    at_once: list[int] = []
    receive = BusLink.receive

    def counted(link: BusLink, now: float) -> list[LinkItem]:
        found = receive(link, now)
        at_once.append(len(found))
        return found

    monkeypatch.setattr(BusLink, "receive", counted)

    async def scenario() -> None:
        server, peers = BusServer("127.0.0.1", 0, ""), Peers(WORKER, 10.0)
        items: list[LinkItem] = []
        link = AsyncBusLink(server.address, "r", "router", 1, "", "", context, handler=items.append)
        link.tick()

        async def until(check: Callable[[], bool]) -> None:
            for _ in range(2000):
                for identity, message in [] if server.socket.closed else server.receive():
                    if isinstance(message, Hello):
                        server.send(identity, peers.hello(identity, message, 0.0)[0])
                    elif isinstance(message, Heartbeat):
                        server.send(identity, HeartbeatAck(seq=message.seq, load=WorkerLoad()))
                    elif isinstance(message, Abort):
                        server.send(identity, TokenBatch(deltas=[TokenDelta(message.request_id, 0, 0, 0, [1])]))
                if check():
                    return
                await asyncio.sleep(0.005)
            raise AssertionError(items)

        await until(lambda: bool(items))
        assert items[0] == Connected(WORKER, 1)
        for i in range(200):  # a send may swallow the edge that announces input: nothing may get stuck
            link.send(Abort(request_id=str(i), attempt=0))
            if i % 7 == 0:
                await asyncio.sleep(0)
        await until(lambda: sum(isinstance(item, TokenBatch) for item in items) == 200)
        batches = [item for item in items if isinstance(item, TokenBatch)]
        assert [batch.deltas[0].request_id for batch in batches] == [str(i) for i in range(200)]
        assert read_bytes > 1 or max(at_once) == 1
        server.close()
        await until(lambda: isinstance(items[-1], Disconnected))
        link.close()

    asyncio.run(scenario())
