"""ZeroMQ between processes: workers bind a ROUTER socket, routers and decode workers connect DEALER sockets.

`BusServer` is the worker's side, `BusLink` the connecting side for a thread that polls, `AsyncBusLink` on asyncio.
None of them ever blocks. Decisions are in `peers.py` (worker) and `link_state.py` (connecting side).

Memory: what waits for a peer is bounded by its lease (a peer silent for lease_s is expired and its requests end) and
by libzmq's heartbeats, which cut a peer that does not read; what waits to be read is bounded by `RECEIVE_HWM` messages.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from penstock.common.bus_access import ClusterMembers, curve_keys, resolve_bind
from penstock.common.bus_tap import Taps
from penstock.common.errors import ConfigError
from penstock.common.link_state import Connected, Disconnected, LinkState, Phase
from penstock.common.messages import PROTOCOL_VERSION, AnyMessage, Goodbye, Hello, Message, Refused, decode, encode
from penstock.common.peers import PeerEvent, PeerExpired, PeerJoined, PeerReplaced, Peers, split_identity, wire_identity

# fmt: off
__all__ = [
    "AsyncBusLink", "BusLink", "BusServer", "Connected", "Disconnected", "LinkItem", "PeerEvent", "PeerExpired",
    "PeerJoined", "PeerReplaced", "Peers", "Phase", "link_context", "split_identity", "wire_identity",
]
# fmt: on

RECEIVE_HWM = 50_000
RECEIVE_AT_MOST = 10_000  # messages in one pass, so that a flood cannot keep a worker from its step
READ_BYTES = 32 << 10  # in one pass of an event loop, and the rest of a message: 3 ms of deltas
MAX_MESSAGE_BYTES = 64 << 20  # a prompt of a million tokens is 5 MB
ZMQ_HEARTBEAT_MS = 1000
ZMQ_HEARTBEAT_TIMEOUT_MS = 5000
CONNECT_TIMEOUT_MS = 5000
NEVER_MS = 1 << 30
MAX_SOCKETS = 65535  # the most that libzmq allows; its own 1023 are 341 links
FLUSH_MS = 200  # what the last messages, a Goodbye among them, get to leave
LOG_INTERVAL_S = 10.0
ZAP_DOMAIN = "penstock"

_CUT = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_CUT |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_CUT |= zmq.EVENT_CONNECT_RETRIED  # all that shows when there is no descriptor for the connection

LinkItem = AnyMessage | Connected | Disconnected

log = logging.getLogger(__name__)


def link_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context for as many links as there are descriptors for."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


class _Cut(NamedTuple):
    reason: str
    refused: bool


def _cut_by(event: zmq.Event, value: int) -> _Cut:
    """Whether a worker with another cluster key says so, or just closes the connection, is a race; one that hangs does
    neither: then libzmq's own time is up, and `value` is no error of a connection."""
    refused = event in (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_AUTH)
    refused |= event is zmq.Event.HANDSHAKE_FAILED_NO_DETAIL and value in (errno.EPIPE, errno.ECONNRESET)
    if refused:
        return _Cut("handshake failed: has it another cluster key?", refused)
    return _Cut(f"connection cut ({event.name})", refused)


def _tune(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, RECEIVE_HWM)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, ZMQ_HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, ZMQ_HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, CONNECT_TIMEOUT_MS)
    socket.setsockopt(zmq.IPV6, 1)


def _read(payload: bytes) -> AnyMessage | str:
    """The message, or why it cannot be read."""
    try:
        return decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return str(error)


class BusServer:
    """The worker's socket. All calls come from the worker's one engine thread.

    Raises:
        ConfigError: the address cannot be bound, or is not loopback while there is no cluster key.

    With a cluster key a context of its own is wanted (a context has one authenticator).
    """

    def __init__(
        self, host: str, port: int, cluster_key: str, context: zmq.Context[zmq.Socket[bytes]] | None = None
    ) -> None:
        bind, announced = resolve_bind(host, cluster_key)
        self.dropped_sends = 0  # to peers that are gone
        self.undecodable = 0
        self._taps = Taps()
        self._own_context = context is None
        self._context = context or zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._next_log = float("-inf")
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        _tune(self.socket)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # so that a peer that is gone shows
        try:
            if cluster_key:
                self._authenticate(cluster_key)
            self.socket.bind(f"tcp://{bind}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot bind the bus to {host}:{port}: {error}") from error
        bound_port = self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
        self.address = f"tcp://{announced}:{bound_port}"

    def receive(self) -> list[tuple[bytes, AnyMessage]]:
        """(identity, message) of everything that is there now. What cannot be read is answered with `Refused`."""
        received: list[tuple[bytes, AnyMessage]] = []
        for _ in range(RECEIVE_AT_MOST):
            try:
                identity, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if self._taps.asked(identity, frames, time.monotonic()):
                continue
            if self._taps:
                self._copy_to_taps(b"in", identity, frames[0])
            message = _read(frames[0]) if len(frames) == 1 else f"{len(frames)} frames instead of one"
            if isinstance(message, str):
                self._refuse(identity, message)
            else:
                received.append((identity, message))
        return received

    def send(self, identity: bytes, message: Message) -> None:
        """Queue a message; one to a peer that is gone is dropped and counted."""
        payload = encode(message)
        try:
            self.socket.send_multipart((identity, payload), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self.dropped_sends += 1
        if self._taps:
            self._copy_to_taps(b"out", identity, payload)

    def close(self) -> None:
        """Close; what is still queued has `FLUSH_MS` to leave. Closing twice does no harm."""
        self.socket.close(FLUSH_MS)
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        if self._own_context:
            self._context.term()

    def _authenticate(self, cluster_key: str) -> None:
        public, secret = curve_keys(cluster_key)
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(ZAP_DOMAIN, ClusterMembers(public))
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        self.socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN.encode())

    def _copy_to_taps(self, direction: bytes, peer: bytes, payload: bytes) -> None:
        for identity, *frames in self._taps.copies(direction, peer, payload, time.monotonic()):
            try:
                self.socket.send_multipart((identity, *frames), zmq.NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                    raise
                self._taps.gone(identity)

    def _refuse(self, identity: bytes, reason: str) -> None:
        self.undecodable += 1
        now = time.monotonic()
        if now >= self._next_log:
            self._next_log = now + LOG_INTERVAL_S
            log.warning(
                "dropped a message of %r that cannot be read: %s (%d in all)", identity, reason, self.undecodable
            )
        self.send(identity, Refused(protocol=PROTOCOL_VERSION, code="protocol", message=f"cannot read this: {reason}"))


class BusLink:
    """A link to one worker, for a thread that polls: a decode worker towards its prefill workers.

    `sockets` belong in the caller's poller and change with every session; a `poller` passed in is kept up to date.
    Call `receive` whenever one of them is readable, and at least a few times a second.
    """

    def __init__(
        self,
        address: str,
        peer_id: str,
        role: str,
        session: int,
        fingerprint: str,
        cluster_key: str,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        lease_s: float = 10.0,
        poller: zmq.Poller | _LoopPoller | None = None,
    ) -> None:
        self.address = address
        self.state = LinkState(peer_id, role, session, fingerprint, lease_s)
        self.dropped_sends = 0
        self._cluster_key = cluster_key
        self._context = context
        self._poller = poller
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._closed = False
        self._read_bytes = sys.maxsize  # in one pass
        self._left = False  # the last pass may have left messages behind

    @property
    def connected(self) -> bool:
        """The worker has accepted this session, and it is not cut as far as we know."""
        return self.state.phase is Phase.GREETED

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], ...]:
        """What to poll for input now: the data socket and its monitor, or nothing between two sessions."""
        return (self._socket, self._monitor) if self._socket and self._monitor else ()

    def receive(self, now: float) -> list[LinkItem]:
        """Everything that happened, in order: messages, `Connected`, `Disconnected`. Also does what is due
        (heartbeats, opening the next session)."""
        if self._closed:
            return []
        items: list[LinkItem] = []
        end = self._open(now) if self.state.must_open(now) else None
        end = end or self._drain(items, now, self._read_bytes)
        if not items and end is None and (cut := self._read_monitor()):  # else it stays readable, and is read then
            # What came in before the cut still counts.
            end = self._drain(items, now) or self.state.lost(cut.reason, now, refused=cut.refused)
        if end is None and self.state.stood_still(now):
            end = self._drain(items, now) or self.state.lost("nothing was sent to it for its whole lease", now)
        if end is None:
            end = self.state.silent(now)
        if end is not None:
            self._close_socket()
            items.append(end)
        elif heartbeat := self.state.heartbeat_due(now):
            self.send(heartbeat)
        return items

    def send(self, message: Message) -> bool:
        """Queue a message. False: there is no session now, the message is dropped."""
        if self._socket is None:
            self.dropped_sends += 1
            return False
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped_sends += 1
            return False
        return True

    def close(self) -> None:
        """Close for good, and tell the worker: what this peer holds there ends. What is queued has `FLUSH_MS` to leave,
        then terminating the context drops it."""
        said = self.connected and self.send(Goodbye())
        self._closed = True
        self._close_socket(FLUSH_MS if said else 0)
        self._poller = None  # on asyncio it holds this link

    def _open(self, now: float) -> Disconnected | None:
        """Begin a session; its end, if there is no socket or descriptor left for it: later there may be."""
        hello = self.state.opened(now)
        try:
            self._connect(hello)
        except (zmq.ZMQError, OSError) as error:
            return self.state.lost(f"cannot connect: {error}", now)
        return None

    def _connect(self, hello: Hello) -> None:
        socket = self._socket = self._context.socket(zmq.DEALER)
        _tune(socket)
        socket.setsockopt(zmq.ROUTING_ID, wire_identity(hello.peer_id, hello.session))
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        # A new connection is a new session, on a new socket. Not -1, which says just that: a connection that is lost
        # then makes libzmq list the network interfaces, and abort the process if there is no descriptor for it.
        socket.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
        if self._cluster_key:
            public, secret = curve_keys(self._cluster_key)
            socket.setsockopt(zmq.CURVE_SERVERKEY, public)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self._monitor = socket.get_monitor_socket(_CUT)
        if self._poller is not None:
            for one in self.sockets:
                self._poller.register(one, zmq.POLLIN)
        socket.connect(self.address)
        socket.send(encode(hello), zmq.NOBLOCK)

    def _close_socket(self, flush_ms: int = 0) -> None:
        if self._socket is None:
            return
        if self._poller is not None:
            for one in self.sockets:
                self._poller.unregister(one)
        self._socket.disable_monitor()
        if self._monitor is not None:
            self._monitor.close(0)
        self._socket.close(flush_ms)
        self._socket = self._monitor = None

    def _read_monitor(self) -> _Cut | None:
        """What cut the connection, if anything has."""
        cut: _Cut | None = None
        while self._monitor is not None and int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            cut = cut or _cut_by(zmq.Event(int(event["event"])), int(event["value"]))
        return cut

    def _drain(self, items: list[LinkItem], now: float, size_bytes: int = sys.maxsize) -> Disconnected | None:
        """Append every message that is there, or so many bytes of them; the session's end, if one of them ends it."""
        self._left = False
        if self._socket is None:
            return None
        for _ in range(RECEIVE_AT_MOST):
            if size_bytes <= 0:
                break
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return None
            size_bytes -= len(payload)
            message = _read(payload)
            if isinstance(message, str):
                return self.state.lost(f"cannot read a message: {message}", now)
            event = self.state.received(message, now)
            if isinstance(event, Disconnected):
                return event
            items.append(message if event is None else event)
        self._left = True
        return None


class AsyncBusLink(BusLink):
    """A `BusLink` on asyncio: `handler` gets every item, in order. Of a burst it gets `READ_BYTES` in one pass of the
    loop, so that a message of a thousand tokens is followed by whatever else is due, not by the next such message.

    Call `tick` a few times a second for what is due; input is handled as it comes.
    """

    def __init__(
        self,
        address: str,
        peer_id: str,
        role: str,
        session: int,
        fingerprint: str,
        cluster_key: str,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        handler: Callable[[LinkItem], None],
        lease_s: float = 10.0,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        poller = _LoopPoller(self._loop, self.tick)
        super().__init__(
            address, peer_id, role, session, fingerprint, cluster_key, context, lease_s=lease_s, poller=poller
        )
        self._handler = handler
        self._read_bytes = READ_BYTES
        self._look_again: asyncio.Handle | None = None

    def tick(self) -> None:
        """Handle what there is and what is due."""
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        for item in self.receive(time.monotonic()):
            self._handler(item)
        if self._left:
            self._look_soon()

    def _look_soon(self) -> None:
        if self._look_again is None and not self._closed:
            self._look_again = self._loop.call_soon(self.tick)

    def send(self, message: Message) -> bool:
        """As `BusLink.send`. ZeroMQ's descriptors signal edges, and a send may use one up: so look again after it."""
        sent = super().send(message)
        if sent:
            self._look_soon()
        return sent

    def close(self) -> None:
        """As `BusLink.close`."""
        super().close()
        if self._look_again is not None:
            self._look_again.cancel()


class _LoopPoller:
    """Lets an event loop watch ZeroMQ sockets, behind the two methods of `zmq.Poller` that a link needs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, readable: Callable[[], None]) -> None:
        self._loop = loop
        self._readable = readable

    def register(self, socket: zmq.Socket[bytes], flags: int) -> None:
        self._loop.add_reader(int(socket.getsockopt(zmq.FD)), self._readable)

    def unregister(self, socket: zmq.Socket[bytes]) -> None:
        self._loop.remove_reader(int(socket.getsockopt(zmq.FD)))
