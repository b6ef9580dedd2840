"""Who may read and write which page, until when: pure bookkeeping for both ends of a hand-off; the clock is passed in.

`LoanBook` is the lender's side (prefill worker), `Landings` the reader's (decode worker), `HeartbeatLog` the reader's
memory of when it sent which heartbeat. A key names one hand-off: (request_id, attempt).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum


class LoanBook:
    """Pages lent to peers. Every method that ends loans returns their page ids, once for every time they were lent:
    the worker then drops that many holds in the engine."""

    def __init__(self, lease_s: float, remember: int = 4096) -> None:
        raise NotImplementedError

    @property
    def lent_pages(self) -> int:
        """Holds outstanding; 0 when nothing is lent."""
        raise NotImplementedError

    def lend(self, peer: str, key: Hashable, pages: Sequence[int], now: float) -> list[int]:
        """One more ticket of `key`. Returns `pages` at once if the key has ended already (do not send the ticket)."""
        raise NotImplementedError

    def renew(self, peer: str, now: float) -> list[int]:
        """A heartbeat of `peer` was processed: its loans live until now + lease_s. Returns [] always ended loans stay ended."""
        raise NotImplementedError

    def land(self, peer: str, key: Hashable) -> list[int]:
        """The peer has read, or given up, everything of `key`."""
        raise NotImplementedError

    def drop_peer(self, peer: str) -> list[int]:
        """The peer's process has exited, or it began a new session: it will use nothing it was lent."""
        raise NotImplementedError

    def expire(self, now: float) -> list[int]:
        """End the loans of peers that were silent for lease_s."""
        raise NotImplementedError


class HeartbeatLog:
    """When this reader sent its heartbeats to one lender: lent_at of a ticket is `sent_at(ticket.heartbeat_seq)`."""

    def __init__(self, started_at: float, remember: int = 64) -> None:
        raise NotImplementedError

    def sent(self, seq: int, now: float) -> None:
        raise NotImplementedError

    def sent_at(self, seq: int) -> float:
        """Send time of heartbeat `seq`; 0 is the session's Hello. A seq that is not remembered gives -inf (never trusted)."""
        raise NotImplementedError


class LandingState(Enum):
    PROMISED = "promised"
    READING = "reading"
    LANDED = "landed"
    FAILED = "failed"


@dataclass(frozen=True)
class Landed:
    """What became of a hand-off's pages, in order of the request's page table."""

    state: LandingState  # LANDED or FAILED
    landed: list[int]  # leading pages whose contents arrived in time and matched
    idle: list[int]  # bound pages with unknown contents that nothing writes: reuse or free them now
    quarantined: list[int]  # may still be written: take them out of the request; `read_ended` gives them back


class Landings:
    """Hand-offs coming in."""

    def __init__(self, lease_s: float) -> None:
        raise NotImplementedError

    promised_pages: int
    quarantined_pages: int

    def promise(self, key: Hashable, first_page: int, num_pages: int) -> None:
        """Room for pages [first_page, first_page + num_pages) of the request's page table was promised."""
        raise NotImplementedError

    def accepts(self, key: Hashable, first_page: int, num_pages: int) -> bool:
        """Whether a ticket is the next one of a hand-off that is still wanted; duplicates and late ones are not."""
        raise NotImplementedError

    def start(self, key: Hashable, first_page: int, pages: Sequence[int], lent_at: float) -> str:
        """Bind our `pages` to a ticket that `accepts` agreed to; returns the tag for its ReadJob."""
        raise NotImplementedError

    def read_done(self, tag: str, finished_at: float) -> bool:
        """The read landed. False: too late to be trusted, the lender may have recycled the pages; the hand-off failed."""
        raise NotImplementedError

    def read_stalled(self, tag: str) -> None:
        """The read failed, but may still write."""
        raise NotImplementedError

    def read_ended(self, tag: str) -> list[int]:
        """The read failed, mismatched or settled: nothing writes any more. Returns pages that leave quarantine."""
        raise NotImplementedError

    def complete(self, key: Hashable) -> None:
        """No more tickets will come (PrefillDone)."""
        raise NotImplementedError

    def fail(self, key: Hashable) -> None:
        """Given up: abort, deadline, lender lost."""
        raise NotImplementedError

    def state(self, key: Hashable) -> LandingState | None:
        raise NotImplementedError

    def take(self, key: Hashable) -> Landed:
        """Forget a hand-off that is LANDED or FAILED and say whose its pages are now."""
        raise NotImplementedError

    def key_of(self, tag: str) -> Hashable | None:
        """The hand-off of an outstanding read."""
        raise NotImplementedError
