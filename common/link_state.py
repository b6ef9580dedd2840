"""The connecting side of a bus link as a pure state machine; `bus.py` owns its sockets.

    CONNECTING --Welcome--> GREETED --cut, left, refused or silent--> LOST --back-off--> CONNECTING (next session)
         └──────────── cut, refused or silent ─────────────────────^

Every session has its own socket and says Hello once. libzmq answers its own heartbeats even while the worker computes,
so a dead or unreachable worker shows as a cut; silence counts only after many leases, for a worker that hangs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec

from penstock.common.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Goodbye,
    Heartbeat,
    Hello,
    Refused,
    Welcome,
    WorkerInfo,
    decode_worker_info,
)

BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 5.0
LOAD_EVERY_S = 0.5  # routers choose and admit by the answers
SILENT_LEASES = 12  # a step may take seconds, so only a worker silent for this many leases counts as hung


class Phase(Enum):
    """Where a link is; see the picture above."""

    CONNECTING = "connecting"
    GREETED = "greeted"
    LOST = "lost"


@dataclass(frozen=True)
class Connected:
    """The worker accepted this session: `worker` is what it says of itself."""

    worker: WorkerInfo
    session: int


@dataclass(frozen=True)
class Disconnected:
    """The session ended; everything that was asked on it is lost. The link connects again by itself."""

    session: int
    reason: str
    greeted: bool  # False: this session never got its Welcome
    left: bool = False  # the worker has left on purpose
    refused: bool = False  # these two do not fit, and will not before one of them is started again


class LinkState:
    """One link to one worker. `session` grows with each connection."""

    def __init__(self, peer_id: str, role: str, session: int, fingerprint: str, lease_s: float) -> None:
        self.peer_id = peer_id
        self.session = session - 1  # opening makes it the first one
        self.phase = Phase.LOST
        self.heartbeat_seq = 0
        self._role = role
        self._fingerprint = fingerprint
        self._lease_s = self._worker_lease_s = lease_s
        self._retry_at = float("-inf")
        self._backoff_s = BACKOFF_FIRST_S
        self._heard_at = float("-inf")
        self._next_heartbeat = float("inf")
        self._forgotten_at = float("inf")

    def must_open(self, now: float) -> bool:
        """True when a new session should be opened now."""
        return self.phase is Phase.LOST and now >= self._retry_at

    def opened(self, now: float) -> Hello:
        """A new socket is being connected: the message to send first."""
        self.session += 1
        self.phase = Phase.CONNECTING
        self._heard_at = now
        return Hello(
            protocol=PROTOCOL_VERSION,
            peer_id=self.peer_id,
            session=self.session,
            role=self._role,
            fingerprint=self._fingerprint,
        )

    def received(self, message: AnyMessage, now: float) -> Connected | Disconnected | None:
        """Note a message of this session; Welcome, Refused and Goodbye change the link's phase."""
        self._heard_at = now
        if isinstance(message, Welcome) and self.phase is Phase.CONNECTING:
            return self._greeted(message, now)
        if isinstance(message, Refused):
            permanent = message.code in ("protocol", "fingerprint")
            return self.lost(f"refused: {message.code}: {message.message}", now, refused=permanent)
        if isinstance(message, Goodbye):
            return self.lost("it has left", now, left=True)
        return None

    def heartbeat_due(self, now: float) -> Heartbeat | None:
        """The heartbeat to send now, or None: three a lease, and as often as a load should be told."""
        if self.phase is not Phase.GREETED or now < self._next_heartbeat:
            return None
        return self.heartbeat(now)

    def heartbeat(self, now: float) -> Heartbeat:
        """The next one, to send now whether it is due or not."""
        self._next_heartbeat = now + min(self._lease_s / 3, LOAD_EVERY_S)
        self._forgotten_at = now + self._worker_lease_s
        self.heartbeat_seq += 1
        return Heartbeat(seq=self.heartbeat_seq)

    def silent(self, now: float) -> Disconnected | None:
        """The session's end, if the worker has said nothing for `SILENT_LEASES` leases."""
        silence_s = now - self._heard_at
        if self.phase is Phase.LOST or silence_s <= SILENT_LEASES * self._lease_s:
            return None
        return self.lost(f"silent for {silence_s:.0f} s", now)

    def stood_still(self, now: float) -> bool:
        """A router has sent nothing for the worker's whole lease, stopped, or on a machine that was paused: the worker
        has ended this session. One that computes says so late, and what it is sent until then would be lost.

        Of workers this says nothing: of two that take long steps neither misses the other meanwhile.
        """
        return self._role == "router" and self.phase is Phase.GREETED and now > self._forgotten_at

    def lost(self, reason: str, now: float, *, left: bool = False, refused: bool = False) -> Disconnected | None:
        """The session is over; a new one may be opened after a back-off that doubles until a Welcome comes, or after
        the longest if the two do not fit."""
        if self.phase is Phase.LOST:
            return None
        greeted = self.phase is Phase.GREETED
        self.phase = Phase.LOST
        self._retry_at = now + (BACKOFF_MOST_S if refused else self._backoff_s)
        self._backoff_s = min(self._backoff_s * 2, BACKOFF_MOST_S)
        return Disconnected(self.session, reason, greeted, left, refused)

    def _greeted(self, welcome: Welcome, now: float) -> Connected | Disconnected | None:
        if welcome.protocol != PROTOCOL_VERSION:
            return self.lost(f"worker speaks protocol {welcome.protocol}", now, refused=True)
        if self._fingerprint and welcome.fingerprint != self._fingerprint:
            return self.lost(f"worker has fingerprint {welcome.fingerprint!r}", now, refused=True)
        try:
            worker = decode_worker_info(welcome.worker)
        except msgspec.DecodeError as error:
            return self.lost(f"Welcome cannot be read: {error}", now, refused=True)
        self.phase = Phase.GREETED
        self._backoff_s = BACKOFF_FIRST_S
        self._next_heartbeat = now
        self._worker_lease_s = worker.lease_s
        self._forgotten_at = now + worker.lease_s
        return Connected(worker, self.session)
