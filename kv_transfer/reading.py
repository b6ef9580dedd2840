"""What a reader wants, what it knows of one hand-off or fetch under way, and what it says when that has ended. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.common.messages import (
    FetchDone,
    PagesLanded,
    PagesReady,
    PrefillDone,
    PrefillFailed,
    Spans,
    WorkerInfo,
    request_key,
)

PATIENCE_S = 2.0


@dataclass(frozen=True)
class Wanted:
    """Pages [first_page, first_page + num_pages) of a request's table. Those before are held by `key`, these promised
    to it; `hashes` are of the request's full pages, from its beginning, and of one that has moved of the last, too,
    which is full in part."""

    key: str
    request_id: str
    attempt: int
    choice: int
    first_page: int
    num_pages: int
    num_tokens: int  # that are known with all of them
    hashes: Sequence[bytes]


@dataclass(frozen=True)
class Read:
    """A hand-off or fetch has ended: the first `computed` tokens of the request are in the pages of `key`.

    `first` came from the prefill worker, if it got so far. `spans` has figures of the transfer only.
    """

    key: str
    computed: int
    first: PrefillDone | None
    spans: Spans


@dataclass(eq=False)
class Reading:
    """One hand-off, or fetch, under way; changed by the reader. Times are of this process's monotonic clock."""

    wanted: Wanted
    worker: WorkerInfo
    fetch: bool
    began_at: float
    came_at: float  # when something came last: the link, a ticket, its pages
    transport: str = ""
    first: PrefillDone | None = None
    failed: str = ""
    ticketed_tokens: int = 0
    reads: int = 0  # tickets that are being read
    checked: bool = True  # they have checksums, all or none
    unproven: dict[str, int] = field(default_factory=dict)  # reads without checksums: what the lender has to answer
    first_ticket_at: float | None = None
    computed_at: float | None = None  # the prompt, but for the way of the message that says so
    landed_at: float = 0.0
    size_bytes: int = 0
    num_pages: int = 0
    num_tokens: int = 0  # in these pages
    mismatches: int = 0

    @property
    def kind(self) -> str:
        """For people."""
        return "fetch" if self.fetch else "hand-off"

    def waits_too_long(self, now: float, held_tokens: int, tokens_per_s: float) -> bool:
        """Whether to give up a source that does not send the next ticket.

        Waiting may cost as much as computing what is missing would (`tokens_per_s`; 0: not known). What is being read
        is the mover's to judge. A prompt that is being computed for us may take its time.
        """
        missing = self.wanted.num_tokens - max(self.ticketed_tokens, held_tokens)
        patience_s = max(PATIENCE_S, missing / tokens_per_s if tokens_per_s > 0 else 0.0)
        return self.fetch and not self.reads and now - self.came_at > patience_s

    def row(self, pages: Sequence[int], now: float) -> dict[str, Any]:
        """For /debug/ledger; `pages` are bound to its tickets."""
        return {
            "key": self.wanted.key,
            "peer": self.worker.incarnation,
            "kind": self.kind,
            "transport": self.transport,
            "pages": list(pages),
            "reads": self.reads,
            "unproven": len(self.unproven),
            "age_s": round(now - self.began_at, 3),
            "quiet_s": round(now - self.came_at, 3),
        }

    def spans(self, now: float) -> Spans:
        """The transfer's part of the request's timeline."""
        if self.fetch:
            return Spans(
                fetch_ms=max(0.0, now - self.began_at) * 1e3,
                fetch_bytes=self.size_bytes,
                fetched_tokens=self.num_tokens,
                source=self.worker.worker_id,
                transport=self.transport,
                checksum_failures=self.mismatches,
            )
        began, ended = self.first_ticket_at, self.landed_at
        exposed_from = self.computed_at if self.computed_at is not None else ended
        return Spans(
            transfer_ms=max(0.0, ended - began) * 1e3 if began is not None else 0.0,
            exposed_transfer_ms=max(0.0, ended - exposed_from) * 1e3,
            transfer_bytes=self.size_bytes,
            transfer_pages=self.num_pages,
            transport=self.transport,
            checksum_failures=self.mismatches,
            local_prefill=bool(self.failed),
        )


def key_of(message: PagesReady | PrefillDone | FetchDone | PrefillFailed) -> str:
    """The hand-off or fetch that a lender's message is about."""
    return request_key(message.request_id, message.choice, message.attempt)


def landed(source: Wanted | PagesReady) -> PagesLanded:
    """To the lender: nothing of it is wanted any more."""
    return PagesLanded(request_id=source.request_id, attempt=source.attempt, choice=source.choice)
