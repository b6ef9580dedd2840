"""A stale ticket never names a reused page: both ends and the wire between them as a state machine, without checksums.

The real lender, reader and ledgers; messages take as long as they like, in order; either side may stand still; copies
read whatever is in the lender's page at that moment. Tickets carry no generations: what a reader trusts must be what
was lent all the same, because of the heartbeats that tickets and answers name, and because a session is one socket.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from penstock.common.messages import (
    Abort,
    GenerateRequest,
    Heartbeat,
    HeartbeatAck,
    Message,
    PagesLanded,
    Prefill,
    PrefillDone,
    Refused,
    WorkerInfo,
    WorkerLoad,
)
from penstock.common.sampling import SamplingParams
from penstock.engine.pages import PageManager
from penstock.kv_transfer.jobs import ReadDone, ReadFailed, ReadSettled, ReadStalled
from penstock.kv_transfer.leases import HeartbeatLog, Landings, LoanBook
from penstock.kv_transfer.lender import Lender
from penstock.kv_transfer.peer_links import LeaseRenewed, PeerFound, PeerLost
from penstock.kv_transfer.peer_transports import PeerTransports
from penstock.kv_transfer.reader import Reader
from penstock.kv_transfer.reading import Wanted
from tests.kv_transfer.noting import NotingMover, nixl_worker

LEASE_S = 10.0
LENDER = nixl_worker("prefill-0", "p1")
LENT_PAGES, READ_PAGES = 4, 8
Content = tuple[str, int]  # of which prompt, which page


class Wire:
    """The reader's link: one session after the other, each with queues and heartbeats of its own."""

    def __init__(self) -> None:
        self.session = 0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """A new socket: what the old one carried is lost."""
        self.session += 1
        self.beats = HeartbeatLog(now)
        self.seq = 0
        self.to_lender: deque[Message] = deque()
        self.to_reader: deque[Message] = deque()

    @property
    def identity(self) -> bytes:
        return f"d/{self.session}".encode()

    def send(self, worker: WorkerInfo, message: Message, now: float) -> None:
        self.to_lender.append(message)

    def send_if_linked(self, incarnation: str, message: Message) -> None:
        self.to_lender.append(message)

    def lent_at(self, incarnation: str, heartbeat_seq: int) -> float:
        return self.beats.sent_at(heartbeat_seq)


class WrongPage(Exception):
    """A page was trusted that holds something else than what was lent."""


class World:
    """What each event does here is what `WorkerLoop`, `PeerLinks` and `PageExchange` do with it."""

    def __init__(self, seed: int) -> None:
        self.chooser = random.Random(seed)
        self.now = 0.0
        self.asked = 0
        self.trusted = 0
        mover: Any = NotingMover()
        self.wire = Wire()
        wire: Any = self.wire
        self.lent = PageManager(LENT_PAGES, 4, caching=False)
        self.lent_memory: list[Content] = [("", 0)] * LENT_PAGES
        self.heard: dict[bytes, tuple[float, int]] = {self.wire.identity: (0.0, 0)}  # by session: when, newest seq
        self.book = LoanBook(LEASE_S)
        self.lender = Lender(
            self.lent, mover, self.book, self._to_reader, lambda who: self.heard[who][1], page_bytes=64, checksum="off"
        )
        self.mover = NotingMover()
        reader_mover: Any = self.mover
        self.pages = PageManager(READ_PAGES, 4, caching=False)
        self.memory: list[Content] = [("", 0)] * READ_PAGES
        self.reader = Reader(self.pages, reader_mover, wire, Landings(LEASE_S), PeerTransports(["nixl"], "auto"))
        self.reader.link_event("p1", PeerFound(LENDER), 0.0)
        self.copied: dict[str, float] = {}  # reads whose bytes have come: when
        self.stalled: set[str] = set()
        self.kept: set[str] = set()

    # ------------------------------------------------------------ the lender

    def _to_reader(self, identity: bytes, message: Message) -> None:
        if identity == self.wire.identity:  # else that socket is gone
            self.wire.to_reader.append(message)

    def _silent(self) -> None:
        """As in every turn of the lender's loop: peers that were silent for a lease lose their loans."""
        for identity, (heard_at, _) in list(self.heard.items()):
            if self.now - heard_at > LEASE_S:
                del self.heard[identity]
                self.lender.peer_gone(identity)
        self.lender.expire(self.now)

    def lender_turns(self) -> None:
        identity = self.wire.identity
        for _ in range(min(self.chooser.randint(1, 4), len(self.wire.to_lender))):
            message = self.wire.to_lender.popleft()
            if identity not in self.heard:
                self.wire.to_reader.append(Refused(protocol=1, code="unknown", message="say Hello first"))
            elif isinstance(message, Heartbeat):
                self.heard[identity] = self.now, message.seq
                self.lender.renew(identity, self.now)
                self._to_reader(identity, HeartbeatAck(seq=message.seq, load=WorkerLoad()))
            elif isinstance(message, Prefill):
                self._compute(identity, message)
            elif isinstance(message, (Abort, PagesLanded)):
                self.lender.landed(identity, f"{message.request_id}:0:0")
        self._silent()

    def _compute(self, identity: bytes, message: Prefill) -> None:
        """Two tickets of a page each, then the first token; without room, nothing: the reader gives up some time."""
        name = message.request.request_id
        key = f"{name}:0:0"
        if self.lent.num_available < 2:
            return
        loan = self.lender.open(identity, key, name, 0, 0, 0)
        for index, page in enumerate(self.lent.allocate(key, 2)):
            self.lent_memory[page] = name, index
            self.lender.offer(loan, [page], 4 * (index + 1), self.now)
        done = PrefillDone(request_id=name, attempt=0, token_ids=[1])
        self.lender.close(loan, lambda now: done, self.now)
        self.lent.release(key)

    def lender_uses_what_is_free(self) -> None:
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
        self.wire.seq += 1
        self.wire.beats.sent(self.wire.seq, self.now)
        self.wire.to_lender.append(Heartbeat(seq=self.wire.seq))

    def reader_turns(self) -> None:
        for _ in range(min(self.chooser.randint(1, 4), len(self.wire.to_reader))):
            message = self.wire.to_reader.popleft()
            if isinstance(message, Refused):
                self._begin_anew("refused")
                break
            renewed = isinstance(message, HeartbeatAck)
            event: Any = LeaseRenewed(self.wire.beats.sent_at(message.seq)) if renewed else message  # type: ignore[attr-defined]
            self.reader.link_event("p1", event, self.now)
        self._take()

    def cut(self) -> None:
        self._begin_anew("cut")

    def _begin_anew(self, reason: str) -> None:
        self.reader.link_event("p1", PeerLost("p1", reason), self.now)
        self._take()
        self.wire.begin(self.now)
        self._greet()
        self.reader.link_event("p1", PeerFound(LENDER), self.now)

    def _greet(self) -> None:
        for old in [identity for identity in self.heard if identity != self.wire.identity]:
            del self.heard[old]
            self.lender.peer_gone(old)
        self.heard.setdefault(self.wire.identity, (self.now, 0))

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
        self.now += self.chooser.choice((0.5, 1.0, 3.0, LEASE_S - 0.5))

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
        assert self.pages.num_held == self.pages.num_promised == self.lent.num_held == 0
        assert self.reader.settled


def test_what_is_trusted_is_what_was_lent() -> None:
    trusted = 0
    for seed in range(150):
        world = World(seed)
        world.live(150)
        world.end()
        trusted += world.trusted
    assert trusted > 100, trusted


def _trust_all(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Landings._settle
    late = lambda self, tag, at: settle(self, tag, None if at is None else float("-inf"))  # noqa: E731
    monkeypatch.setattr(Landings, "_settle", late)


def _believe_late_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    renew = Landings.renew
    monkeypatch.setattr(Landings, "renew", lambda self, key, sent_at, now: renew(self, key, sent_at, float("-inf")))


def _free_what_may_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageManager, "move", lambda self, holder, new, pages: self.release_some(holder, pages))


@pytest.mark.parametrize("without", [_trust_all, _believe_late_answers, _free_what_may_be_written])
def test_without_one_of_the_fences_it_goes_wrong(
    without: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test above would prove nothing."""
    without(monkeypatch)
    with pytest.raises(WrongPage):
        for seed in range(2000):
            World(seed).live(150)
