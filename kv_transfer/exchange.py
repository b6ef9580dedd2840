"""What one worker exchanges with others: pages it lends and pages it reads, over one mover. Held by both roles.

In: bus messages of peers, events of our links to lenders, completions of the mover. Out: tickets, and `Read`s to take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zmq

from penstock.common.config import WorkerConfig
from penstock.common.memory import MemoryRegion
from penstock.common.messages import AnyMessage, Fetch, Message, PagesLanded, WorkerInfo, request_key
from penstock.common.rate_estimator import RateEstimator
from penstock.kv_transfer.base import Transport
from penstock.kv_transfer.jobs import Sealed
from penstock.kv_transfer.leases import Landings
from penstock.kv_transfer.lender import Lender, LentPages
from penstock.kv_transfer.mover import PageMover
from penstock.kv_transfer.peer_links import PeerLinks
from penstock.kv_transfer.peer_transports import PeerTransports
from penstock.kv_transfer.reader import Reader, ReadPages

_REMIND_S = 1.0  # how often the mover hears that readers are at work here: within its _QUICK_S


class Pages(LentPages, ReadPages, Protocol):
    """The page ledger (engine/pages.py)."""


class PageExchange:
    """One worker's lender and reader. Used from its loop thread."""

    def __init__(self, lender: Lender, reader: Reader, mover: PageMover, links: PeerLinks) -> None:
        self.lender = lender
        self.reader = reader
        self._mover = mover
        self._links = links
        self._remind_at = 0.0

    def poll(self, now: float) -> None:
        """Once per turn of the loop: take what links and mover have, and let time pass."""
        for incarnation, event in self._links.poll(now):
            self.reader.link_event(incarnation, event, now)
        for completion in self._mover.poll_done():
            if isinstance(completion, Sealed):
                self.lender.sealed(completion, now)
            else:
                self.reader.completed(completion, now)
        self.reader.expire(now)
        if now >= self._remind_at and self.lender.lent_pages:  # a reader takes as long as its link needs
            self._mover.expect_readers()
            self._remind_at = now + _REMIND_S

    def handle(self, identity: bytes, message: AnyMessage, now: float) -> bool:
        """A message of a peer; False: it is not about lent pages."""
        if isinstance(message, Fetch):
            self.lender.fetch(identity, request_key(message.request_id, message.choice, message.attempt), message, now)
        elif isinstance(message, PagesLanded):
            self.lender.landed(identity, request_key(message.request_id, message.choice, message.attempt))
        else:
            return False
        return True

    def busy(self) -> bool:
        """Whether loans or reads are open."""
        return self.lender.lent_pages > 0 or not self.reader.settled

    def holders(self) -> set[str]:
        """For whom pages are held, lent or read."""
        return self.lender.holders() | self.reader.holders()

    def load(self) -> dict[str, int]:
        """Fields of `WorkerLoad`."""
        counters = self.reader.counters.load()
        counters["transfer_pages"] += self.lender.lent_total
        return {
            **counters,
            "transfer_bytes": self._mover.moved_bytes,
            "expired_loans": self.lender.expired,
            "lent_pages": self.lender.lent_pages,
            "quarantined_pages": self.reader.quarantined_pages,
        }

    def ledger(self) -> dict[str, Any]:
        """Part of /debug/ledger."""
        now = time.monotonic()
        return {
            "loans": self.lender.rows(now),
            "reading": self.reader.rows(now),
            "lent_pages": self.lender.lent_pages,
            "reads": len(self.reader),
            "quarantined_pages": self.reader.quarantined_pages,
            "page_links": len(self._links),
            "transports": dict(self.reader.transports.chosen),
        }

    def close(self) -> bool:
        """Give links and mover back; False as `PageMover.close`."""
        self._links.close()
        return self._mover.close()


def open_exchange(
    config: WorkerConfig,
    info: WorkerInfo,
    pages: Pages,
    region: MemoryRegion,
    transports: Sequence[Transport],
    *,
    checksum: Callable[[Sequence[int]], list[int]],
    wake: Callable[[], None],
    poller: zmq.Poller,
    send: Callable[[bytes, Message], None],
    rates: RateEstimator,
) -> PageExchange:
    """Join mover, links and books; starts the mover's thread. The arguments are those of the parts."""
    mover = PageMover(region, transports, wake, checksum=checksum)
    links = PeerLinks(info.incarnation, info.role, info.fingerprint, config.cluster_key, poller)
    lender = Lender(
        pages,
        mover,
        send,
        page_bytes=region.page_bytes,
        checksum=config.kv_checksum,
    )
    chosen = PeerTransports([transport.name for transport in transports], config.kv_transport)
    reader = Reader(pages, mover, links, Landings(), chosen, rates)
    return PageExchange(lender, reader, mover, links)
