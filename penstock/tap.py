"""`penstock tap`: prints what passes on the bus of a running fleet, a line a message.

Every message has a worker at one end, so a tap asks the workers for copies (common/bus_tap.py) and reads them with the
`msgpack` package: no message type of ours is imported, so that it shows what is on the wire, not what we think of it.
`describe` and `Filter` are pure.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgpack
import zmq

from penstock.ask_fleet import ask_fleet
from penstock.client_options import ClientParser, api_key, readable, server_url, whole
from penstock.common.bus_access import curve_keys
from penstock.common.bus_tap import LEASE_S, REQUEST
from penstock.common.errors import ConfigError

CREDIT = 2000
HEARTBEATS = ("heartbeat", "heartbeat_ack")
SILENT_S = 10.0  # heartbeats pass more often, wherever a router is linked
_SHOWN_ITEMS, _SHOWN_CHARACTERS = 8, 80


@dataclass(frozen=True)
class Seen:
    """One message at one worker. `body` is what MessagePack says, or why it cannot be read."""

    at_s: float  # time.time()
    worker: str
    direction: str  # "in" or "out", as the worker sees it
    peer: str
    size_bytes: int
    body: Any

    @property
    def tag(self) -> str:
        """The message's `type`, or "?"."""
        return str(self.body.get("type", "?")) if isinstance(self.body, dict) else "?"


@dataclass(frozen=True)
class Filter:
    """What is wanted; empty: everything, heartbeats excepted unless `heartbeats` or their tag is given."""

    tags: tuple[str, ...] = ()
    request_id: str = ""  # or the beginning of one
    heartbeats: bool = False

    def wants(self, seen: Seen) -> bool:
        """Whether a message is to be shown."""
        if self.tags:
            return seen.tag in self.tags and self._mentions(seen.body)
        return (self.heartbeats or seen.tag not in HEARTBEATS) and self._mentions(seen.body)

    def _mentions(self, body: Any) -> bool:
        return not self.request_id or any(one.startswith(self.request_id) for one in texts(body))


def texts(value: Any) -> Iterator[str]:
    """Every text in a message. Deltas travel as arrays, without field names: so a request id may be any of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)


def shortened(value: Any) -> Any:
    """The value with long lists, texts and bytes cut, their full length said: prompts are thousands of tokens."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str) and len(value) > _SHOWN_CHARACTERS:
        return f"{value[:_SHOWN_CHARACTERS]}... ({len(value)} characters)"
    if isinstance(value, dict):
        return {str(key): shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        rest = len(value) - _SHOWN_ITEMS
        return [shortened(part) for part in value[:_SHOWN_ITEMS]] + ([f"... {rest} more"] if rest > 0 else [])
    return value


def describe(seen: Seen) -> str:
    """The line of a message."""
    clock = time.strftime("%H:%M:%S", time.localtime(seen.at_s)) + f".{int(seen.at_s * 1000) % 1000:03d}"
    ends = f"{seen.peer} -> {seen.worker}" if seen.direction == "in" else f"{seen.worker} -> {seen.peer}"
    body = seen.body
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if name != "type"}
    return f"{clock}  {ends}  {seen.tag}  {seen.size_bytes} B  {json.dumps(shortened(body), ensure_ascii=False)}"


def as_json(seen: Seen) -> str:
    """The line of a message as JSON."""
    fields = {"time_s": seen.at_s, "worker": seen.worker, "direction": seen.direction, "peer": seen.peer}
    return json.dumps(fields | {"tag": seen.tag, "size_bytes": seen.size_bytes, "body": shortened(seen.body)})


class Tap:
    """Connections to some workers; copies come out of `receive`. Use it as a context manager."""

    def __init__(self, workers: dict[str, str], names: dict[str, str], cluster_key: str = "") -> None:
        """`workers`: name -> address of its bus. `names`: how to call a peer id, where that is known."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._workers: dict[zmq.Socket[bytes], str] = {}
        self._names = names
        self._used: dict[zmq.Socket[bytes], int] = {}
        self._renew_at = 0.0
        self.missed: dict[str, int] = {}  # by worker: messages it had no credit for
        for name, address in workers.items():
            socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IPV6, 1)
            socket.setsockopt(zmq.ROUTING_ID, f"tap-{os.getpid()}-{secrets.token_hex(4)}".encode())
            if cluster_key:
                public, secret = curve_keys(cluster_key)
                socket.setsockopt(zmq.CURVE_SERVERKEY, public)
                socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
                socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
            try:
                socket.connect(address)
            except zmq.ZMQError as error:
                socket.close()
                self.close()
                raise ConfigError(f"{address} is not the address of a bus: {error}") from error
            self._poller.register(socket, zmq.POLLIN)
            self._workers[socket] = name
            self._used[socket] = 0

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def receive(self, timeout_s: float = 0.5) -> list[Seen]:
        """What has come, waiting up to timeout_s for it."""
        now = time.monotonic()
        for socket in self._workers:
            if now >= self._renew_at or self._used[socket] >= CREDIT // 2:
                self._used[socket] = 0
                with suppress(zmq.Again):  # its worker has been gone for so long that enough wait for the next one
                    socket.send_multipart((REQUEST, b"%d" % CREDIT), zmq.NOBLOCK)
        if now >= self._renew_at:
            self._renew_at = now + LEASE_S / 3
        seen = []
        for socket, _ in self._poller.poll(int(timeout_s * 1000)):
            while self._used[socket] < CREDIT // 2 and int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                seen.append(self._read(socket))
        return seen

    def close(self) -> None:
        """Close everything."""
        for socket in self._workers:
            socket.close()
        self._context.term()

    def _read(self, socket: zmq.Socket[bytes]) -> Seen:
        direction, peer, payload, missed = socket.recv_multipart()
        self._used[socket] += 1
        worker = self._workers[socket]
        self.missed[worker] = int(missed)
        peer_id = peer.decode(errors="replace").rpartition("/")[0]
        body = read(payload)
        return Seen(time.time(), worker, direction.decode(), self._names.get(peer_id, peer_id), len(payload), body)


def read(payload: bytes) -> Any:
    """What a payload says; one that is not MessagePack is shown as a text that says so."""
    try:
        return msgpack.unpackb(payload, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        return f"not MessagePack: {error} ({payload[:32].hex()})"


def main(arguments: Sequence[str]) -> int:
    """Print until Ctrl-C or --limit.

    Raises:
        ConfigError: no fleet, no such worker, or an address that is none.
    """
    options = _parser().parse(arguments, os.environ)
    if options.bus:
        workers, names = {address: address for address in options.bus}, {}
    else:
        known = ask_fleet(options.url, options.api_key)["workers"]
        names = {worker["incarnation"]: worker["worker_id"] for worker in known}
        workers = {worker["worker_id"]: worker["address"] for worker in known}
    wanted = {name: address for name, address in workers.items() if not options.worker or name in options.worker}
    if not wanted:
        raise ConfigError(f"no such worker; there are {', '.join(workers) or 'none'}")
    chosen = Filter(
        tuple(tag for text in options.tag for tag in text.split(",")), options.request_id, options.heartbeats
    )
    show = as_json if options.json else describe
    printed = 0
    silent, told_at = set(wanted), time.monotonic() + SILENT_S
    try:
        with Tap(wanted, names, options.cluster_key) as tap:
            while not options.limit or printed < options.limit:
                missed = sum(tap.missed.values())
                for seen in tap.receive():
                    silent.discard(seen.worker)
                    if chosen.wants(seen) and (not options.limit or printed < options.limit):
                        print(show(seen), flush=True)
                        printed += 1
                if sum(tap.missed.values()) > missed:
                    print(f"penstock tap: missed {sum(tap.missed.values())} messages so far", file=sys.stderr)
                if silent and time.monotonic() >= told_at:
                    print(f"penstock tap: nothing comes from {', '.join(sorted(silent))}", file=sys.stderr)
                    silent.clear()
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # `penstock tap | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _bus(text: str) -> str:
    try:
        parts = urlsplit(readable(text))
        usable = parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port)
    except ValueError:
        usable = False
    if not usable:
        raise ArgumentTypeError(f"{text!r} is not the address of a bus: tcp://HOST:PORT")
    return text


def _parser() -> ClientParser:
    parser = ClientParser("penstock tap", "Print what passes on the bus of a running fleet.")
    parser.add_argument(
        "--url", type=server_url, default="http://127.0.0.1:8000", help="a router of the fleet: it knows the workers"
    )
    parser.add_argument("--api-key", default=api_key(os.environ), help="if the router wants one")
    cluster_key = os.environ.get("PENSTOCK_CLUSTER_KEY", "")
    parser.add_argument("--cluster-key", type=readable, default=cluster_key, help="if the bus is encrypted")
    parser.add_argument(
        "--bus",
        type=_bus,
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a worker's bus (tcp://HOST:PORT), without a router",
    )
    parser.add_argument("--worker", action="append", default=[], help="only at this worker")
    parser.add_argument("--tag", action="append", default=[], help="only these message types: submit,tokens")
    parser.add_argument("--request-id", default="", help="only messages that name this request, or one that begins so")
    parser.add_argument("--heartbeats", action="store_true", help="heartbeats, too")
    parser.add_argument("--limit", type=whole(), default=0, help="leave after so many messages; 0: never")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    return parser
