"""The lender's side of pages that move: tickets out, sealed and in order, until the reader has all of them.

    open ──offer──> sealing ──sealed──> ticket sent ──close──> last message behind the last ticket
                                             └── landed │ session gone: the loan lets go of its pages

Used by both workers: a prefill worker offers what it computes; whoever caches a prefix offers it to who fetches it. A
page is held by the loan ("loan-7") from its offer until the reader has all it wants, or its session is gone
(leases.py), so that it is neither evicted nor written meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from penstock.common.messages import Fetch, FetchDone, Message, PagesReady
from penstock.kv_transfer.jobs import Sealed, SealJob
from penstock.kv_transfer.mover import PageMover

SAMPLE_EVERY = 16
TICKET_BYTES = 32 << 20  # of a prefix: the first pages are read while the next ones are sealed


class LentPages(Protocol):
    """What a lender needs of the page ledger."""

    page_size: int

    def match(self, hashes: Iterable[bytes]) -> list[int]: ...
    def with_room(self, pages: Sequence[int]) -> list[int]: ...
    def hold(self, holder: str, pages: Sequence[int]) -> None: ...
    def release(self, holder: str) -> list[int]: ...
    def table(self, holder: str) -> list[int]: ...


@dataclass(eq=False)
class _Ticket:
    """Pages of a loan that are being sealed, or wait for those before them."""

    first_page: int
    num_tokens: int
    pages: list[int]
    tag: str = ""  # of its SealJob
    checksums: list[int] | None = None  # None: not sealed yet; empty: not checked


@dataclass(eq=False)
class Loan:
    """One hand-off's or fetch's pages, to one reader. `ended`: no ticket goes out any more."""

    holder: str  # of its pages; the line of its SealJobs, too: the first ticket is read while the next one is sealed
    began_at: float
    identity: bytes
    request_id: str
    attempt: int
    choice: int
    key: str
    next_page: int  # of the request's table: the first that was not offered yet
    checked: bool
    tickets: list[_Ticket] = field(default_factory=list)  # not sent yet, in order
    last: Callable[[float], Message] | None = None  # to follow the last ticket, made when it does
    ended: bool = False


class Lender:
    """All loans of one worker. Used from its loop thread; checksums are the mover's.

    `send` is the bus's; `checksum` is all, sample or off.
    """

    def __init__(
        self,
        pages: LentPages,
        mover: PageMover,
        send: Callable[[bytes, Message], None],
        *,
        page_bytes: int,
        checksum: str,
    ) -> None:
        self.lent_total = 0  # pages, since the start
        self.expired = 0  # loans taken back from readers that were gone, since the start
        self._pages = pages
        self._mover = mover
        self._send = send
        self._checksum = checksum
        self._ticket_pages = max(1, TICKET_BYTES // page_bytes)
        self._loans: dict[tuple[bytes, str], Loan] = {}
        self._sealing: dict[str, tuple[Loan, _Ticket]] = {}  # by tag
        self._count = 0
        self._seals = 0

    @property
    def lent_pages(self) -> int:
        """Pages that a reader may be reading, or that are about to be offered to it."""
        return sum(len(self._pages.table(loan.holder)) for loan in self._loans.values())

    def holders(self) -> set[str]:
        """For whom pages are held here."""
        return {loan.holder for loan in self._loans.values()}

    def rows(self, now: float) -> list[dict[str, object]]:
        """Every loan, for /debug/ledger: whose it is, who holds its pages, which, and how long it is out."""
        return [
            {
                "peer": loan.identity.decode(),
                "key": loan.key,
                "holder": loan.holder,
                "pages": list(self._pages.table(loan.holder)),
                "age_s": round(now - loan.began_at, 3),
            }
            for loan in self._loans.values()
        ]

    # ------------------------------------------------------------ one loan

    def open(
        self, identity: bytes, key: str, request_id: str, attempt: int, choice: int, first_page: int, now: float
    ) -> Loan:
        """Begin to lend to this peer, from this page of the request on."""
        self.landed(identity, key)  # a peer that asks a second time has no use for what it got
        self._count += 1
        checked = self._checksum == "all" or (self._checksum == "sample" and self._count % SAMPLE_EVERY == 1)
        holder = f"loan-{self._count}"
        loan = Loan(holder, now, identity, request_id, attempt, choice, key, first_page, checked)
        self._loans[identity, key] = loan
        return loan

    def offer(self, loan: Loan, pages: Sequence[int], num_tokens: int, now: float) -> None:
        """The request's next pages are complete, `num_tokens` tokens of it with them. They must stay as they are."""
        if loan.ended or not pages:
            return
        self._pages.hold(loan.holder, pages)
        ticket = _Ticket(loan.next_page, num_tokens, list(pages))
        loan.tickets.append(ticket)
        loan.next_page += len(pages)
        if loan.checked:
            self._seals += 1
            ticket.tag = f"seal-{self._seals}"
            self._sealing[ticket.tag] = loan, ticket
            self._mover.seal(SealJob(ticket.tag, tuple(pages), loan.holder))
        else:
            self._mover.expect_readers()
            ticket.checksums = []
            self._lend(loan, now)

    def close(self, loan: Loan, last: Callable[[float], Message], now: float) -> None:
        """All has been offered: send `last` behind the last ticket, made with the time when that is."""
        loan.last = last
        self._close_if_done(loan, now)

    def drop(self, loan: Loan) -> None:
        """Send no more tickets; the pages stay until the reader is done with those that are out."""
        for ticket in loan.tickets:
            if self._sealing.pop(ticket.tag, None) is not None:
                self._mover.cancel(ticket.tag)
        loan.tickets.clear()
        self._end(loan)

    def fetch(self, identity: bytes, key: str, message: Fetch, now: float) -> None:
        """Lend what is cached of the pages that a peer asks for, but for what has been promised to others."""
        if (identity, key) in self._loans:
            return
        pages = self._pages.with_room(self._pages.match(message.hashes))
        loan = self.open(identity, key, message.request_id, message.attempt, message.choice, message.first_page, now)
        for start in range(0, len(pages), self._ticket_pages):
            batch = pages[start : start + self._ticket_pages]
            self.offer(loan, batch, (loan.next_page + len(batch)) * self._pages.page_size, now)
        done = FetchDone(
            request_id=message.request_id, attempt=message.attempt, choice=message.choice, num_pages=len(pages)
        )
        self.close(loan, lambda now: done, now)

    # ------------------------------------------------------------ what happens

    def sealed(self, completion: Sealed, now: float) -> None:
        """The mover has the checksums of a ticket, which may be one of a loan that was dropped meanwhile."""
        loan, ticket = self._sealing.pop(completion.tag, (None, None))
        if loan is not None and ticket is not None:
            ticket.checksums = completion.checksums
            self._lend(loan, now)

    def landed(self, identity: bytes, key: str) -> None:
        """The reader has all it wants, finished or not."""
        loan = self._loans.pop((identity, key), None)
        if loan is not None:
            self.drop(loan)
            self._pages.release(loan.holder)

    def peer_gone(self, identity: bytes) -> None:
        """The session was silent for a lease, left, or is replaced. It may still read, but will trust nothing of it."""
        for loan in [loan for loan in self._loans.values() if loan.identity == identity]:
            self.expired += bool(self._pages.table(loan.holder))
            self.landed(identity, loan.key)

    # ------------------------------------------------------------ inside

    def _lend(self, loan: Loan, now: float) -> None:
        """Send the tickets of a loan that are sealed, in order."""
        while loan.tickets and (checksums := loan.tickets[0].checksums) is not None:
            ticket = loan.tickets.pop(0)
            self.lent_total += len(ticket.pages)
            self._send(
                loan.identity,
                PagesReady(
                    request_id=loan.request_id,
                    attempt=loan.attempt,
                    choice=loan.choice,
                    first_page=ticket.first_page,
                    pages=[ticket.pages],
                    checksums=[checksums] if checksums else [],
                    num_tokens=ticket.num_tokens,
                ),
            )
        self._close_if_done(loan, now)

    def _close_if_done(self, loan: Loan, now: float) -> None:
        if loan.last is not None and not loan.tickets and not loan.ended:
            self._end(loan)
            self._send(loan.identity, loan.last(now))

    def _end(self, loan: Loan) -> None:
        loan.ended = True
        # Without pages there is nothing to say PagesLanded of. The name may be a newer loan's by now.
        name = loan.identity, loan.key
        if not self._pages.table(loan.holder) and self._loans.get(name) is loan:
            del self._loans[name]
