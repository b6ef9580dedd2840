"""Page reuse under a late write, step by step, on memory of bytes: with the fences nothing wrong is kept or written.

Each case also runs with its fence taken away, and must then go wrong: else it would prove nothing.
"""

from __future__ import annotations

from typing import Any

import pytest

from penstock.common.messages import PROTOCOL_VERSION, GenerateRequest, Hello, PagesReady, Prefill, PrefillDone
from penstock.common.peers import Peers, wire_identity
from penstock.common.sampling import SamplingParams
from penstock.engine.pages import PageManager
from penstock.kv_transfer.jobs import ReadDone, ReadSettled, ReadStalled
from penstock.kv_transfer.leases import Landings, SessionLease
from penstock.kv_transfer.lender import Lender
from penstock.kv_transfer.peer_links import PeerFound
from penstock.kv_transfer.peer_transports import PeerTransports
from penstock.kv_transfer.reader import QUARANTINE, Reader
from penstock.kv_transfer.reading import Wanted
from tests.kv_transfer.noting import NotingLinks, NotingMover, nixl_worker

LEASE_S = 10.0
LENDER = nixl_worker("prefill-0", "p1")
PAGES = 3


class Reading:
    """A reader with a pool of three pages, `memory[page]` saying what is in each; it wants two pages."""

    def __init__(self, until: float = LEASE_S) -> None:
        self.memory = [b"empty"] * PAGES
        self.pages = PageManager(PAGES, 4)
        self.mover = NotingMover()
        mover: Any = self.mover
        links: Any = NotingLinks(until=until)
        self.reader = Reader(self.pages, mover, links, Landings(), PeerTransports(["nixl"], "auto"))
        self.pages.promise("r:0:0", 2)
        wanted = Wanted("r:0:0", "r", 0, 0, 0, 2, 8, [])
        request = GenerateRequest(request_id="r", prompt_token_ids=list(range(8)), sampling=SamplingParams())
        message = Prefill(request=request, router_id="router")
        self.reader.hand_off(wanted, LENDER, message, 0.0)
        self._event(PeerFound(LENDER))
        self._event(
            PagesReady(request_id="r", attempt=0, first_page=0, pages=[[0, 1]], checksums=[[7, 7]], num_tokens=8)
        )
        (self.job,) = self.mover.jobs.values()

    def _event(self, event: Any) -> None:
        self.reader.link_event("p1", event, 0.0)

    def copy_lands(self, source: list[bytes]) -> None:
        """The bytes of the read arrive, whoever owns the pages by then."""
        for src, dst in zip(self.job.src_pages, self.job.dst_pages, strict=True):
            self.memory[dst] = source[src]

    def done(self, at: float) -> int:
        """The read and the hand-off end; tokens of it that are trusted."""
        self._event(PrefillDone(request_id="r", attempt=0, token_ids=[1]))
        self.reader.completed(ReadDone(self.job.tag, 128, at, at), at)
        (read,) = self.reader.take_ended()
        return read.computed


@pytest.mark.parametrize("fenced", [True, False])
def test_a_read_that_lands_late_writes_into_nobody_elses_pages(fenced: bool) -> None:
    """The reader's fence: pages of a stalled read stay in quarantine until it has settled."""
    case = Reading()
    if not fenced:
        case.pages.move = lambda holder, new, pages: case.pages.release_some(holder, pages)  # type: ignore[method-assign]
    case.reader.completed(ReadStalled(case.job.tag, 5.0), 6.0)
    case.pages.release("r:0:0")  # the request was computed elsewhere, or is gone
    taken = case.pages.allocate("other", case.pages.num_available)
    for page in taken:
        case.memory[page] = b"other's"
    case.copy_lands([b"late", b"late"])
    assert all(case.memory[page] == b"other's" for page in taken) == fenced
    if fenced:
        assert case.pages.table(QUARANTINE) == list(case.job.dst_pages)
        case.reader.completed(ReadSettled(case.job.tag), 60.0)
        assert case.pages.table(QUARANTINE) == [] and case.reader.settled
        case.pages.release("other")
        assert case.pages.num_held == 0
        case.pages.check()


@pytest.mark.parametrize("fenced", [True, False])
def test_pages_that_a_lender_has_given_to_others_are_not_trusted(fenced: bool) -> None:
    """The lender's fence: it lets go of what a silent session was lent, and a reader that was silent so long knows."""
    lent = PageManager(2, 4)
    memory = [b"prompt", b"prompt"]
    sent: list[Any] = []
    mover: Any = NotingMover()
    peers = Peers(LENDER, LEASE_S)

    def send(identity: bytes, message: Any) -> None:
        sent.append(message)

    lender = Lender(lent, mover, send, page_bytes=64, checksum="off")
    identity, lease = wire_identity("d", 1), SessionLease(LENDER.lease_s, 0.0)
    peers.hello(identity, Hello(protocol=PROTOCOL_VERSION, peer_id="d", session=1, role="decode", fingerprint="f"), 0.5)
    lease.answered(0)
    lease.sent(1, 1.0)
    peers.heartbeat(identity, 1.5)
    lease.answered(1)
    lent.allocate("r", 2)
    lender.offer(lender.open(identity, "r:0:0", "r", 0, 0, 0, 2.0), lent.table("r"), 8, 2.0)
    lent.release("r")
    assert lent.holders().keys() == {"loan-1"} and lent.table("loan-1") == sent[0].pages[0]
    # The reader is stopped here, for longer than its lease; its copy begins when it goes on.
    assert peers.expire(11.5) == [] and lent.num_held == 2
    for expired in peers.expire(11.6):
        lender.peer_gone(expired.identity)
    assert lent.num_held == 0
    for page in lent.allocate("other", 2):
        memory[page] = b"other's"
    case = Reading(until=lease.until if fenced else float("inf"))
    case.copy_lands(memory)
    trusted = case.done(at=12.0)
    wrong = [page for page in case.pages.table("r:0:0")[: trusted // 4] if case.memory[page] != b"prompt"]
    assert (wrong == []) == fenced
    assert (trusted == 0) == fenced
