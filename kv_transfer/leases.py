"""Who may read and write which page, until when: pure bookkeeping of a reader; the clock is passed in.

`Landings` is what a reader knows of the pages that come in, and `SessionLease` until when it may trust them. A key
names one hand-off, or one fetch.

    promise ──> start(ticket) ──> read_done ... ──> complete ──> LANDED ──> take
                     └──> read failed, late, stalled, or fail ──> FAILED ──> take ──> quarantine until settled

The lease is that of the reader's session, one socket, which heartbeats renew (common/peers.py): it has what it was lent
as long as the lender knows it. A lender answers no session that it has forgotten, so every answer proves that all of
the session's loans were there then, and are for a lease from when what it answers was sent, unless the lender dies.
Checksums would show that; for pages that have none, only an answer to what was sent after they had come will do.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum

CLOCKS_AGREE = 0.99  # of a lease is believed: two machines' clocks may run at rates that differ by less than a percent


class SessionLease:
    """Until when a lender keeps, at least, what it has lent to one session of ours, on our clock."""

    def __init__(self, lease_s: float, started_at: float) -> None:
        """`lease_s`: the lender's. `started_at`: when the session's Hello was sent; it counts as heartbeat 0."""
        self.until = float("-inf")
        self.proven = (
            0  # the newest heartbeat that was answered: after it was sent the lender lived, and kept its loans
        )
        self._lease_s = lease_s * CLOCKS_AGREE
        self._unanswered: dict[int, float] = {0: started_at}

    def sent(self, seq: int, now: float) -> None:
        """Heartbeat `seq` leaves at `now` or later."""
        self._unanswered[seq] = now

    def answered(self, seq: int) -> None:
        """The lender has processed heartbeat `seq`: it knew this session then, whenever that was."""
        self.proven = max(self.proven, seq)
        sent_at = self._unanswered.pop(seq, None)
        if sent_at is not None:
            self.until = max(self.until, sent_at + self._lease_s)


class LandingState(Enum):
    """PROMISED: no ticket yet. READING: some. LANDED: all pages are here. FAILED: what is missing will not come."""

    PROMISED = "promised"
    READING = "reading"
    LANDED = "landed"
    FAILED = "failed"


@dataclass(frozen=True)
class Landed:
    """Whose the pages of an ended hand-off are; each list in the order of the request's page table."""

    state: LandingState  # LANDED or FAILED
    landed: list[int]  # leading pages with the right contents: keep
    idle: list[int]  # further pages that nothing writes, contents unknown: reuse or free
    quarantined: list[int]  # may still be written: take out of the request, hold until a read event returns them


@dataclass
class _Read:
    """One ticket being read; `open` as long as it may write, `good` once it has landed in time."""

    pages: list[int]
    open: bool = True
    good: bool = False


@dataclass
class _Handoff:
    next_page: int
    end_page: int
    state: LandingState = LandingState.PROMISED
    complete: bool = False
    reads: dict[str, _Read] = field(default_factory=dict)


class Landings:
    """Hand-offs coming in. Tickets arrive in order of pages; every ticket is one read, known by its tag.

    After each event ask `state`; when it says LANDED or FAILED, `take` the outcome. The three read events return pages
    that leave quarantine with them (non-empty only after `take`). Unknown keys and tags change nothing.
    """

    def __init__(self) -> None:
        self._handoffs: dict[Hashable, _Handoff] = {}
        self._keys: dict[str, Hashable] = {}  # of reads whose hand-off has not been taken
        self._quarantine: dict[str, list[int]] = {}  # by read: pages of hand-offs that were taken
        self._reads = 0

    @property
    def quarantined_pages(self) -> int:
        """Pages withheld after their hand-off was taken, because a read may still write them."""
        return sum(map(len, self._quarantine.values()))

    def promise(self, key: Hashable, first_page: int, num_pages: int) -> None:
        """Expect pages [first_page, first_page + num_pages) of the request's page table.

        Raises:
            ValueError: the key is in use.
        """
        if key in self._handoffs:
            raise ValueError(f"hand-off {key!r} has been promised already")
        self._handoffs[key] = _Handoff(first_page, first_page + num_pages)

    def accepts(self, key: Hashable, first_page: int, num_pages: int) -> bool:
        """Whether a ticket is the next one of a hand-off still wanted: no duplicate, not late, within bounds."""
        handoff = self._handoffs.get(key)
        return (
            handoff is not None
            and handoff.state in (LandingState.PROMISED, LandingState.READING)
            and not handoff.complete
            and handoff.next_page == first_page
            and 0 < num_pages <= handoff.end_page - first_page
        )

    def start(self, key: Hashable, first_page: int, pages: Sequence[int]) -> str:
        """Bind our `pages` to a ticket; returns the tag for its ReadJob. They may be written from here on.

        Raises:
            ValueError: `accepts` does not agree.
        """
        if not self.accepts(key, first_page, len(pages)):
            raise ValueError(f"ticket for page {first_page} of hand-off {key!r} is not acceptable")
        handoff = self._handoffs[key]
        handoff.next_page += len(pages)
        handoff.state = LandingState.READING
        self._reads += 1
        tag = f"read-{self._reads}"
        handoff.reads[tag] = _Read(list(pages))
        self._keys[tag] = key
        return tag

    def read_done(self, tag: str) -> list[int]:
        """Everything arrived and matched, while the lender kept the pages (`SessionLease`)."""
        return self._settle(tag, good=True)

    def read_ended(self, tag: str) -> list[int]:
        """The read failed, mismatched, came late, or settled after a stall: nothing writes any more, the contents are
        unknown."""
        return self._settle(tag, good=False)

    def read_stalled(self, tag: str) -> list[int]:
        """The read has failed but may still write."""
        if tag in self._keys:
            self.fail(self._keys[tag])
        return []

    def complete(self, key: Hashable, end_page: int | None = None) -> None:
        """No more tickets will come (PrefillDone, FetchDone); pages that no ticket covered fail the hand-off.

        `end_page`: the lender has fewer pages than were promised room, up to this one.
        """
        handoff = self._handoffs.get(key)
        if handoff is not None:
            handoff.complete = True
            handoff.end_page = min(handoff.end_page, end_page) if end_page is not None else handoff.end_page
            self._advance(handoff)

    def fail(self, key: Hashable) -> None:
        """Give up what has not landed: abort, deadline, lender lost. A hand-off that has LANDED stays so."""
        handoff = self._handoffs.get(key)
        if handoff is not None and handoff.state is not LandingState.LANDED:
            handoff.state = LandingState.FAILED

    def state(self, key: Hashable) -> LandingState | None:
        """None: unknown, or taken."""
        handoff = self._handoffs.get(key)
        return handoff.state if handoff is not None else None

    def take(self, key: Hashable) -> Landed:
        """Forget an ended hand-off; its pages are the caller's, save those in quarantine.

        Raises:
            ValueError: it has not ended (or is not known).
        """
        if self.state(key) not in (LandingState.LANDED, LandingState.FAILED):
            raise ValueError(f"hand-off {key!r} has not ended")
        handoff = self._handoffs.pop(key)
        outcome = Landed(handoff.state, [], [], [])
        leading = True
        for tag, read in handoff.reads.items():
            del self._keys[tag]
            leading = leading and read.good
            if read.open:
                self._quarantine[tag] = read.pages
            (outcome.quarantined if read.open else outcome.landed if leading else outcome.idle).extend(read.pages)
        return outcome

    def _settle(self, tag: str, good: bool) -> list[int]:
        if tag in self._quarantine:
            return self._quarantine.pop(tag)
        if tag in self._keys:
            handoff = self._handoffs[self._keys[tag]]
            read = handoff.reads[tag]
            if read.open:
                read.open = False
                read.good = good
                self._advance(handoff)
        return []

    def _advance(self, handoff: _Handoff) -> None:
        """LANDED when all is here, FAILED as soon as that cannot happen any more."""
        if handoff.state in (LandingState.LANDED, LandingState.FAILED):
            return
        covered = handoff.next_page == handoff.end_page
        if any(not read.open and not read.good for read in handoff.reads.values()) or (
            handoff.complete and not covered
        ):
            handoff.state = LandingState.FAILED
        elif handoff.complete and all(read.good for read in handoff.reads.values()):
            handoff.state = LandingState.LANDED
