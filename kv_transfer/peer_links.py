"""A worker's links to workers whose pages it reads: one per incarnation, made when first needed, kept until it is cut.

In: messages to send. Out: what came back, until when each lender keeps what it lent, and which workers are lost. A
message for a link that is still connecting waits until its Welcome, however long a busy worker takes: that nobody is
there libzmq notices (common/link_state.py).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import zmq

from penstock.common.bus import BusLink, Connected, Disconnected, link_context
from penstock.common.messages import AnyMessage, HeartbeatAck, Message, WorkerInfo
from penstock.kv_transfer.leases import SessionLease

logger = logging.getLogger(__name__)
SESSIONS_A_LINK = 1_000_000


@dataclass(frozen=True)
class PeerLost:
    """The link to this worker is gone: nothing more will come of what was asked on it."""

    incarnation: str
    reason: str
    left: bool = False  # on purpose


@dataclass(frozen=True)
class PeerFound:
    """The handshake with this worker is complete; `worker` says how its pages can be read."""

    worker: WorkerInfo


@dataclass(eq=False)
class _Link:
    worker: WorkerInfo
    link: BusLink
    lease: SessionLease
    waiting: list[Message] = field(default_factory=list)


LinkEvent = PeerLost | PeerFound | AnyMessage


class PeerLinks:
    """All links of one worker; used from its loop thread."""

    def __init__(self, peer_id: str, role: str, fingerprint: str, cluster_key: str, poller: zmq.Poller) -> None:
        self._peer_id = peer_id
        self._role = role
        self._fingerprint = fingerprint
        self._cluster_key = cluster_key
        self._poller = poller
        self._context = link_context()
        self._links: dict[str, _Link] = {}
        self._early: list[tuple[str, LinkEvent]] = []  # of links that were opened since the last poll
        self._sessions = 0

    def __len__(self) -> int:
        return len(self._links)

    def send(self, worker: WorkerInfo, message: Message, now: float) -> None:
        """Send to a worker, over a new link if there is none; lost if that link is cut before."""
        if worker.incarnation not in self._links:
            self._open(worker, now)
        self.send_if_linked(worker.incarnation, message)

    def send_if_linked(self, incarnation: str, message: Message) -> None:
        """Send unless the link is gone; then the worker has ended this peer's requests by itself."""
        link = self._links.get(incarnation)
        if link is not None and link.link.connected:
            link.link.send(message)
        elif link is not None:
            link.waiting.append(message)

    def leased_until(self, incarnation: str) -> float:
        """Until when this lender keeps what it has lent to the link's session, at least; -inf without a link."""
        link = self._links.get(incarnation)
        return float("-inf") if link is None else link.lease.until

    def ask(self, incarnation: str, now: float) -> int:
        """Have a linked lender say that it keeps what it has lent: `proven` is this number or more once it has."""
        link = self._links[incarnation]
        heartbeat = link.link.state.heartbeat(now)
        link.lease.sent(heartbeat.seq, now)
        link.link.send(heartbeat)
        return heartbeat.seq

    def proven(self, incarnation: str) -> int:
        """The newest number that this lender has answered."""
        return self._links[incarnation].lease.proven

    def poll(self, now: float) -> list[tuple[str, LinkEvent]]:
        """What happened on all links, as (incarnation, event). A lost link is closed and forgotten."""
        events, self._early = self._early, []
        for incarnation, link in list(self._links.items()):
            events += [(incarnation, event) for event in self._receive(incarnation, link, now)]
        return events

    def close(self) -> None:
        for incarnation in list(self._links):
            self._close(incarnation)
        self._context.term()

    def _open(self, worker: WorkerInfo, now: float) -> None:
        self._sessions += SESSIONS_A_LINK  # a link counts on by itself; a newer link must be newer than all of that
        link = BusLink(
            worker.address,
            self._peer_id,
            self._role,
            self._sessions,
            self._fingerprint,
            self._cluster_key,
            self._context,
            lease_s=worker.lease_s,
            poller=self._poller,
        )
        opened = self._links[worker.incarnation] = _Link(worker, link, SessionLease(worker.lease_s, now))
        # Connects. On a busy machine the worker's answer may be there before this thread goes on.
        self._early += [(worker.incarnation, event) for event in self._receive(worker.incarnation, opened, now)]

    def _receive(self, incarnation: str, link: _Link, now: float) -> list[LinkEvent]:
        events: list[LinkEvent] = []
        lost: PeerLost | None = None
        seq = link.link.state.heartbeat_seq
        for item in link.link.receive(now):
            if isinstance(item, Connected):
                if item.worker.incarnation != incarnation:
                    lost = PeerLost(incarnation, f"restarted as {item.worker.incarnation}")
                    break
                link.lease.answered(0)
                events.append(PeerFound(item.worker))
                for message in link.waiting:
                    link.link.send(message)
                link.waiting.clear()
            elif isinstance(item, Disconnected):
                lost = PeerLost(incarnation, item.reason, item.left)
            elif isinstance(item, HeartbeatAck):
                link.lease.answered(item.seq)
            else:
                events.append(item)
        if link.link.state.heartbeat_seq > seq:
            link.lease.sent(link.link.state.heartbeat_seq, now)
        if lost is not None:
            level = logging.INFO if lost.left else logging.WARNING
            logger.log(level, "no more pages are read of worker %s: %s", link.worker.worker_id, lost.reason)
            self._close(incarnation)
            events.append(lost)
        return events

    def _close(self, incarnation: str) -> None:
        self._links.pop(incarnation).link.close()
