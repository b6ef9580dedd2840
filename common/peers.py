"""Who is connected to a worker: the pure side of the handshake and of peer leases. Used by both workers.

Identity on the wire is "peer_id/session". The worker feeds `Hello` and `Heartbeat` in and gets the answer to send, and
events that say whose requests and loans have to end. The clock is passed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from penstock.common.messages import PROTOCOL_VERSION, Hello, Refused, Welcome, WorkerInfo, encode


def wire_identity(peer_id: str, session: int) -> bytes:
    """ZeroMQ routing id of one connection of a peer (at most 255 bytes, as ZeroMQ demands)."""
    identity = _identity(peer_id, session)
    if len(identity) > 255:
        raise ValueError(f"peer id is too long for a ZeroMQ identity: {peer_id!r}")
    return identity


def _identity(peer_id: str, session: int) -> bytes:
    return f"{peer_id}/{session}".encode()


def split_identity(identity: bytes) -> tuple[str, int]:
    """(peer_id, session) of a wire identity; raises ValueError when it is not one of ours."""
    peer_id, slash, session = identity.decode().rpartition("/")
    if not slash:
        raise ValueError(f"not the identity of a peer: {identity!r}")
    return peer_id, int(session)


@dataclass(frozen=True)
class PeerJoined:
    """A peer said Hello and was accepted."""

    identity: bytes
    peer_id: str
    role: str


@dataclass(frozen=True)
class PeerReplaced:
    """The peer came back with a newer session: what `identity`, its older one, holds has to end."""

    identity: bytes
    peer_id: str


@dataclass(frozen=True)
class PeerExpired:
    """The peer was silent for a whole lease: what it holds has to end."""

    identity: bytes
    peer_id: str


PeerEvent = PeerJoined | PeerReplaced | PeerExpired


@dataclass
class _Peer:
    peer_id: str
    session: int
    role: str
    heard_at: float


@dataclass
class Peers:
    """The peers of one worker by wire identity, at most one session of each.

    Set `draining` to refuse routers that come from now on; peers that are known keep their lease. Workers may still
    come to read pages.
    """

    worker: WorkerInfo
    lease_s: float
    draining: bool = False
    _by_identity: dict[bytes, _Peer] = field(default_factory=dict)
    _newest: dict[str, bytes] = field(default_factory=dict)  # peer_id -> identity

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._by_identity

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._by_identity)

    def __len__(self) -> int:
        return len(self._by_identity)

    def identity_of(self, peer_id: str) -> bytes | None:
        """Where to send to a peer that is known by name (a first token to the request's router)."""
        return self._newest.get(peer_id)

    def role(self, identity: bytes) -> str:
        """ "router", "prefill", "decode" or "operator"."""
        return self._by_identity[identity].role

    def routers(self) -> list[bytes]:
        """The routers among them."""
        return [identity for identity, peer in self._by_identity.items() if peer.role == "router"]

    def hello(self, identity: bytes, hello: Hello, now: float) -> tuple[Welcome | Refused, list[PeerEvent]]:
        """Accept or refuse: the answer to send, and what happened to this peer and its older session."""
        refusal = self._refusal(identity, hello)
        if refusal is not None:
            return refusal, []
        events: list[PeerEvent] = []
        old = self._newest.get(hello.peer_id)
        if old is not None and old != identity:
            del self._by_identity[old]
            events.append(PeerReplaced(old, hello.peer_id))
        if old != identity:
            events.append(PeerJoined(identity, hello.peer_id, hello.role))
        self._by_identity[identity] = _Peer(hello.peer_id, hello.session, hello.role, heard_at=now)
        self._newest[hello.peer_id] = identity
        welcome = Welcome(protocol=PROTOCOL_VERSION, fingerprint=self.worker.fingerprint, worker=encode(self.worker))
        return welcome, events

    def heartbeat(self, identity: bytes, now: float) -> bool:
        """Renew the peer's lease. False: it is not known (any more); answer with `unknown()`."""
        peer = self._by_identity.get(identity)
        if peer is None:
            return False
        peer.heard_at = now
        return True

    def leases(self, now: float) -> dict[str, float]:
        """How many seconds each session keeps what it holds, unless it is heard again. For people."""
        return {i.decode(): round(p.heard_at + self.lease_s - now, 3) for i, p in self._by_identity.items()}

    def left(self, identity: bytes) -> str:
        """The peer said Goodbye: forget it. Returns its peer id."""
        peer_id = self._by_identity.pop(identity).peer_id
        del self._newest[peer_id]
        return peer_id

    def expire(self, now: float) -> list[PeerExpired]:
        """Forget the peers whose lease has ended."""
        silent = [identity for identity, peer in self._by_identity.items() if now - peer.heard_at > self.lease_s]
        return [PeerExpired(identity, self.left(identity)) for identity in silent]

    @staticmethod
    def unknown() -> Refused:
        """Answer to a peer that has to say Hello first (never did, or its lease has ended)."""
        return Refused(protocol=PROTOCOL_VERSION, code="unknown", message="say Hello first: no lease for this session")

    def _refusal(self, identity: bytes, hello: Hello) -> Refused | None:
        if hello.protocol != PROTOCOL_VERSION:
            return self._refuse("protocol", f"protocol {hello.protocol}, this worker speaks {PROTOCOL_VERSION}")
        if identity != _identity(hello.peer_id, hello.session):
            return self._refuse("protocol", "identity does not match peer_id and session")
        known = self._newest.get(hello.peer_id)
        if known is not None and self._by_identity[known].session > hello.session:
            return self._refuse("unknown", f"a newer session of {hello.peer_id} is connected")
        needs_fingerprint = hello.role in ("prefill", "decode") or hello.fingerprint != ""
        if needs_fingerprint and hello.fingerprint != self.worker.fingerprint:
            return self._refuse("fingerprint", f"fingerprint {hello.fingerprint!r} is not {self.worker.fingerprint!r}")
        if self.draining and hello.role == "router" and identity not in self._by_identity:
            return self._refuse("draining", "this worker is draining")
        return None

    @staticmethod
    def _refuse(code: str, message: str) -> Refused:
        return Refused(protocol=PROTOCOL_VERSION, code=code, message=message)
