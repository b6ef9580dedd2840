"""A stale ticket never names a reused page: both ends and the wire between them as a state machine.

The real lender, reader and ledgers; messages take as long as they like, in order; either side may stand still; copies
read whatever is in the lender's page at that moment, and the lender's clock is fast. Tickets carry no generations: what
a reader trusts must be what was lent all the same, because a lender answers only sessions whose loans it has kept.

Nobody compares checksums. Tickets that have some are trusted by the lease, for as long as the lender lives; tickets
that have none by an answer, and there the lender may die: what its pages hold then is anything.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from penstock.common.messages import (
    PROTOCOL_VERSION,
    Abort,
    GenerateRequest,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Message,
    PagesLanded,
    PagesReady,
    Prefill,
    PrefillDone,
    Refused,
    Welcome,
    WorkerInfo,
    WorkerLoad,
)
from penstock.common.peers import Peers, wire_identity
from penstock.common.sampling import SamplingParams
from penstock.engine.pages import PageManager
from penstock.kv_transfer import leases
from penstock.kv_transfer.jobs import ReadDone, ReadFailed, ReadSettled, ReadStalled
from penstock.kv_transfer.leases import Landings, SessionLease
from penstock.kv_transfer.lender import Lender
from penstock.kv_transfer.peer_links import PeerFound, PeerLost
from penstock.kv_transfer.peer_transports import PeerTransports
from penstock.kv_transfer.reader import Reader
from penstock.kv_transfer.reading import Wanted
from tests.kv_transfer.noting import NotingMover, nixl_worker

LEASE_S = 10.0
FAST = 1.005  # seconds of the lender's clock in one of the reader's
LENDER = nixl_worker("prefill-0", "p1")
LENT_PAGES, READ_PAGES = 4, 8
Content = tuple[str, int]  # of which prompt, which page


class Wire:
    """The reader's link: one session after the other, each with queues and a lease of its own."""

    def __init__(self) -> None:
        self.session = 0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """A new socket, which says Hello first: what the old one carried is lost."""
        self.session += 1
        self.lease = SessionLease(LEASE_S, now)
        self.seq = 0
        hello = Hello(protocol=PROTOCOL_VERSION, peer_id="d", session=self.session, role="decode", fingerprint="f")
        self.to_lender: deque[Message] = deque([hello])
        self.to_reader: deque[Message] = deque()

    @property
    def identity(self) -> bytes:
        return wire_identity("d", self.session)

    def send(self, worker: WorkerInfo, message: Message, now: float) -> None:
        self.to_lender.append(message)

    def send_if_linked(self, incarnation: str, message: Message) -> None:
        self.to_lender.append(message)

    def heartbeat(self, now: float) -> int:
        self.seq += 1
        self.lease.sent(self.seq, now)
        self.to_lender.append(Heartbeat(seq=self.seq))
        return self.seq

    def leased_until(self, incarnation: str) -> float:
        return self.lease.until

    def ask(self, incarnation: str, now: float) -> int:
        return self.heartbeat(now)

    def proven(self, incarnation: str) -> int:
        return self.lease.proven


class WrongPage(Exception):
    """A page was trusted that holds something else than what was lent."""


class World:
    """What each event does here is what `WorkerLoop`, `PeerLinks` and `PageExchange` do with it."""

    def __init__(self, seed: int, *, checksums: bool) -> None:
        self.chooser = random.Random(seed)
        self.now = 0.0
        self.asked = 0
        self.trusted = 0
        self.wire = Wire()
        wire: Any = self.wire
        self.checksums = checksums
        self.lent_memory: list[Content] = []
        self._lender_starts()
        self.mover = NotingMover()
        reader_mover: Any = self.mover
        self.pages = PageManager(READ_PAGES, 4, caching=False)
        self.memory: list[Content] = [("", 0)] * READ_PAGES
        self.reader = Reader(self.pages, reader_mover, wire, Landings(), PeerTransports(["nixl"], "auto"))
        self.copied: dict[str, float] = {}  # reads whose bytes have come: when
        self.stalled: set[str] = set()
        self.kept: set[str] = set()

    # ------------------------------------------------------------ the lender

    def _lender_starts(self) -> None:
        mover: Any = NotingMover()
        self.alive = True
        self.lent = PageManager(LENT_PAGES, 4, caching=False)
        self.lent_memory[:] = [("", 0)] * LENT_PAGES
        self.peers = Peers(LENDER, LEASE_S)
        self.lender = Lender(self.lent, mover, self._to_reader, page_bytes=64, checksum="off")

    def lender_dies(self) -> None:
        """What it has sent may still come; that it is gone the reader hears later (`cut`)."""
        self.alive = False
        self.lent_memory[:] = [("nobody's", 0)] * LENT_PAGES

    def _to_reader(self, identity: bytes, message: Message) -> None:
        if isinstance(message, PagesReady) and self.checksums:
            message = msgspec.structs.replace(message, checksums=[[0] * len(message.pages[0])])
        if identity == self.wire.identity:  # else that socket is gone
            self.wire.to_reader.append(message)

    def _silent(self) -> None:
        """As in every turn of the lender's loop: peers that were silent for a lease lose their loans."""
        if not self.alive:
            return
        for expired in self.peers.expire(FAST * self.now):
            self.lender.peer_gone(expired.identity)

    def lender_turns(self) -> None:
        if not self.alive:
            return
        identity = self.wire.identity
        for _ in range(min(self.chooser.randint(1, 4), len(self.wire.to_lender))):
            message = self.wire.to_lender.popleft()
            if isinstance(message, Hello):
                answer, events = self.peers.hello(identity, message, FAST * self.now)
                for event in events:
                    if event.identity != identity:
                        self.lender.peer_gone(event.identity)
                self._to_reader(identity, answer)
            elif not self._known(identity):
                self._to_reader(identity, Peers.unknown())
            elif isinstance(message, Heartbeat):
                self.peers.heartbeat(identity, FAST * self.now)
                self._to_reader(identity, HeartbeatAck(seq=message.seq, load=WorkerLoad()))
            elif isinstance(message, Prefill):
                self._compute(identity, message)
            elif isinstance(message, (Abort, PagesLanded)):
                self.lender.landed(identity, f"{message.request_id}:0:0")
        self._silent()

    def _known(self, identity: bytes) -> bool:
        return identity in self.peers

    def _compute(self, identity: bytes, message: Prefill) -> None:
        """Two tickets of a page each, then the first token; without room, nothing: the reader gives up some time."""
        name = message.request.request_id
        key = f"{name}:0:0"
        if self.lent.num_available < 2:
            return
        loan = self.lender.open(identity, key, name, 0, 0, 0, self.now)
        for index, page in enumerate(self.lent.allocate(key, 2)):
            self.lent_memory[page] = name, index
            self.lender.offer(loan, [page], 4 * (index + 1), self.now)
        done = PrefillDone(request_id=name, attempt=0, token_ids=[1])
        self.lender.close(loan, lambda now: done, self.now)
        self.lent.release(key)

    def lender_uses_what_is_free(self) -> None:
        if not self.alive:
            return
        for page in self.lent.allocate("other", self.lent.num_available):
            self.lent_memory[page] = "other's", page
        self.lent.release("other")

    def lender_looks_at_leases(self) -> None:
        self._silent()

    # ------------------------------------------------------------ the reader

    def ask(self) -> None:
        if self.pages.num_available < 2 or len(self.reader) >= 2:
            return
        self.asked += 1
        name = f"r{self.asked}"
        request = GenerateRequest(request_id=name, prompt_token_ids=list(range(8)), sampling=SamplingParams())
        self.pages.promise(f"{name}:0:0", 2)
        wanted = Wanted(f"{name}:0:0", name, 0, 0, 0, 2, 8, [])
        self.reader.hand_off(wanted, LENDER, Prefill(request=request, router_id="router"), self.now)

    def give_up(self) -> None:
        for row in self.reader.rows(self.now)[:1]:
            self.reader.cancel(row["key"])
            self.pages.release(row["key"])

    def heartbeat(self) -> None:
        self.wire.heartbeat(self.now)

    def reader_turns(self) -> None:
        for _ in range(min(self.chooser.randint(1, 4), len(self.wire.to_reader))):
            message = self.wire.to_reader.popleft()
            if isinstance(message, Refused):
                self._begin_anew("refused")
                break
            if isinstance(message, HeartbeatAck):
                self.wire.lease.answered(message.seq)
            elif isinstance(message, Welcome):
                self.wire.lease.answered(0)
                self.reader.link_event("p1", PeerFound(LENDER), self.now)
            else:
                event: Any = message
                self.reader.link_event("p1", event, self.now)
        self.reader.expire(self.now)
        self._take()

    def cut(self) -> None:
        self._begin_anew("cut")

    def _begin_anew(self, reason: str) -> None:
        self.reader.link_event("p1", PeerLost("p1", reason), self.now)
        self._take()
        self.wire.begin(self.now)
        if not self.alive:
            self._lender_starts()

    # ------------------------------------------------------------ copies

    def _under_way(self) -> list[str]:
        return [tag for tag in self.mover.jobs if tag not in self.copied]

    def copy(self) -> None:
        """The bytes of a read come: what is in those pages now, whoever they belong to."""
        for tag in self._under_way()[:1]:
            job = self.mover.jobs[tag]
            for src, dst in zip(job.src_pages, job.dst_pages, strict=True):
                self.memory[dst] = self.lent_memory[src]
            self.copied[tag] = self.now

    def tell(self) -> None:
        """The mover's word of a read reaches the loop, perhaps much later."""
        if not self.copied:
            return
        tag, failed = self.chooser.choice(sorted(self.copied)), self.chooser.random() < 0.1
        finished_at = self.copied.pop(tag)
        job = self.mover.jobs.pop(tag)
        event: Any = ReadFailed(tag, "cut") if failed else ReadDone(tag, 64 * len(job.dst_pages), 0.1, finished_at)
        if tag in self.stalled:
            self.stalled.discard(tag)
            event = ReadSettled(tag)
        self.reader.completed(event, self.now)
        self._take()

    def stall(self) -> None:
        for tag in [tag for tag in self._under_way() if tag not in self.stalled][:1]:
            self.stalled.add(tag)
            self.reader.completed(ReadStalled(tag, 5.0), self.now)
            self._take()

    def pass_time(self) -> None:
        self.now += self.chooser.choice((0.5, 1.0, 3.0, LEASE_S - 0.5, LEASE_S - 0.03))

    # ------------------------------------------------------------ what must hold

    def _take(self) -> None:
        for read in self.reader.take_ended():
            name = read.key.partition(":")[0]
            pages = self.pages.table(read.key)[: read.computed // 4]
            self.trusted += len(pages)
            if [self.memory[page] for page in pages] != [(name, index) for index in range(len(pages))]:
                raise WrongPage
            self.pages.release(read.key)

    def _check(self) -> None:
        """What a read may still write, as far as the loop knows, is somebody's: of this read, or in quarantine."""
        held = {page for table in self.pages.holders().values() for page, _ in table}
        for job in self.mover.jobs.values():
            if not held.issuperset(job.dst_pages):
                raise WrongPage
        self.pages.check()
        self.lent.check()

    def live(self, events: int) -> None:
        """So many events, the ordinary ones more often."""
        seldom: list[Callable[[], None]] = [self.cut, self.give_up, self.stall]
        if not self.checksums:
            seldom.append(self.lender_dies)
        often = [self.ask, self.heartbeat, self.lender_looks_at_leases, self.lender_uses_what_is_free, self.pass_time]
        always = [self.lender_turns, self.reader_turns, self.copy, self.tell]
        choices = seldom + 8 * often + 16 * always
        for _ in range(events):
            self.chooser.choice(choices)()
            self._check()

    def end(self) -> None:
        """Everybody goes home: nothing is held on either side."""
        for row in self.reader.rows(self.now):
            self.reader.cancel(row["key"])
            self.pages.release(row["key"])
        for tag in list(self.mover.jobs):
            self.reader.completed(ReadSettled(tag) if tag in self.stalled else ReadFailed(tag, "cancelled"), self.now)
        self.now += LEASE_S + 1
        self._silent()
        assert not self.alive or self.lent.num_held == 0
        assert self.pages.num_held == self.pages.num_promised == 0
        assert self.reader.settled


@pytest.mark.parametrize("checksums", [True, False])
def test_what_is_trusted_is_what_was_lent(checksums: bool) -> None:
    trusted = 0
    for seed in range(400):
        world = World(seed, checksums=checksums)
        world.live(150)
        world.end()
        trusted += world.trusted
    assert trusted > 100, trusted


def _trust_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wire, "leased_until", lambda self, incarnation: float("inf"))


def _answer_a_forgotten_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "_known", lambda self, identity: True)


def _count_a_longer_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's own, say, where the lender was started with another."""
    monkeypatch.setattr(leases, "CLOCKS_AGREE", 2.0)


def _believe_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "CLOCKS_AGREE", 1.0)


def _free_what_may_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageManager, "move", lambda self, holder, new, pages: self.release_some(holder, pages))


def _do_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """And trust the lease of a lender that may be gone."""
    monkeypatch.setattr(Wire, "ask", lambda self, incarnation, now: 0)


@pytest.mark.parametrize(
    ("without", "checksums"),
    [
        (_trust_all, True),
        (_answer_a_forgotten_session, True),
        (_count_a_longer_lease, True),
        (_believe_the_clocks, True),
        (_free_what_may_be_written, True),
        (_answer_a_forgotten_session, False),
        (_free_what_may_be_written, False),
        (_do_not_ask, False),
    ],
)
def test_without_one_of_the_fences_it_goes_wrong(
    without: Callable[[pytest.MonkeyPatch], None], checksums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test above would prove nothing."""
    without(monkeypatch)
    with pytest.raises(WrongPage):
        for seed in range(2000):
            World(seed, checksums=checksums).live(150)
