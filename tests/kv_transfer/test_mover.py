"""The mover with a transport that does what the test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from penstock.common.memory import MemoryRegion
from penstock.kv_transfer.base import Copy, CopyState, Transport, TransportError
from penstock.kv_transfer.mover import (
    ConnectFailed,
    PageMover,
    ReadDone,
    ReadFailed,
    ReadJob,
    ReadMismatch,
    ReadSettled,
    ReadStalled,
    Sealed,
    SealJob,
)
from tests.kv_transfer.pools import count, wait_for

PAGE = 1024
REGION = MemoryRegion(address=0, page_bytes=PAGE, num_pages=100)


class FakeTransport(Transport):
    """Notes what it is asked; copies stand at `state` until the test settles them."""

    name = "fake"

    def __init__(self) -> None:
        self.state = CopyState.DONE
        self.posted: list[tuple[str, list[int], list[int]]] = []
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.refuse = False

    def progress(self) -> None:
        self.threads.add(threading.current_thread().name)

    def description(self) -> bytes:
        return b"fake"

    def connect(self, peer: str, description: bytes) -> None:
        if description == b"bad":
            raise TransportError("bad description")
        self.calls.append(f"connect {peer}")

    def disconnect(self, peer: str) -> None:
        assert self.state is not CopyState.PENDING, "disconnected with a copy in flight"
        self.calls.append(f"disconnect {peer}")

    def post(self, peer: str, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Copy:
        if self.refuse:
            raise TransportError("refused")
        self.posted.append((peer, list(src_pages), list(dst_pages)))
        return Copy(peer, PAGE * len(dst_pages))

    def poll(self, copy: Copy) -> CopyState:
        self.threads.add(threading.current_thread().name)
        return self.state

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def fake() -> FakeTransport:
    return FakeTransport()


Start = Callable[..., PageMover]


@pytest.fixture
def start(fake: FakeTransport) -> Iterator[Start]:
    """A mover over the fake, connected to peer "p"; the checksum of page n is 1000 + n."""
    movers: list[PageMover] = []

    def make(stall_s: float = 60.0, wake: Callable[[], None] = lambda: None) -> PageMover:
        mover = PageMover(
            REGION,
            [fake],
            wake,
            stall_s=stall_s,
            batch_bytes=4 * PAGE,
            checksum=lambda pages: [1000 + page for page in pages],
        )
        movers.append(mover)
        mover.connect("p", "fake", b"fake")
        return mover

    yield make
    for mover in movers:
        mover.close()


def read(tag: str, first: int, number: int, checked: bool = False) -> ReadJob:
    pages = list(range(first, first + number))
    return ReadJob(tag, "p", "fake", pages, pages, [1000 + page for page in pages] if checked else [])


def test_a_read_goes_in_batches_and_wakes(fake: FakeTransport, start: Start) -> None:
    woken = threading.Event()
    mover = start(wake=woken.set)
    mover.read(read("a", 0, 10, checked=True))
    assert woken.wait(60)
    (done,) = wait_for(mover, count(1))
    assert isinstance(done, ReadDone) and done.size_bytes == 10 * PAGE and done.seconds >= 0.0
    assert [dst for _, _, dst in fake.posted] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert fake.threads == {"page-mover"}


def test_a_transport_may_want_larger_batches(fake: FakeTransport) -> None:
    fake.batch_bytes = 6 * PAGE
    mover = PageMover(REGION, [fake], checksum=lambda pages: [1000 + page for page in pages])
    mover.connect("p", "fake", b"fake")
    mover.read(read("a", 0, 10, checked=True))
    assert isinstance(wait_for(mover, count(1))[0], ReadDone)
    assert [len(dst) for _, _, dst in fake.posted] == [6, 4]
    assert mover.close()


def test_jobs_take_turns(fake: FakeTransport, start: Start) -> None:
    mover = start()
    fake.state = CopyState.PENDING
    mover.read(read("long", 0, 40))
    mover.read(read("short", 50, 2))
    mover.seal(SealJob("seal", range(6)))
    assert wait_for(mover, count(1)) == [Sealed("seal", [1000, 1001, 1002, 1003, 1004, 1005])]
    fake.state = CopyState.DONE
    assert [c.tag for c in wait_for(mover, count(2)) if isinstance(c, ReadDone)] == ["short", "long"]


def test_mismatches_name_the_pages(start: Start) -> None:
    mover = start()
    job = read("a", 0, 10, checked=True)
    wrong = list(job.checksums)
    wrong[2], wrong[9] = 0, 0
    mover.read(ReadJob("a", "p", "fake", job.src_pages, job.dst_pages, wrong))
    assert wait_for(mover, count(1)) == [ReadMismatch("a", [2, 9])]


def test_stalled_is_unsettled_until_the_transport_settles(fake: FakeTransport, start: Start) -> None:
    mover = start(stall_s=0.05)
    fake.state = CopyState.PENDING
    mover.read(read("a", 0, 10))
    (stalled,) = wait_for(mover, count(1))
    assert isinstance(stalled, ReadStalled) and stalled.seconds >= 0.05
    mover.cancel("a")
    mover.disconnect("p")
    mover.seal(SealJob("later", [1]))
    assert [type(c) for c in wait_for(mover, count(1))] == [Sealed]
    assert "disconnect p" not in fake.calls
    fake.state = CopyState.DONE
    assert wait_for(mover, count(1)) == [ReadSettled("a")]
    assert len(fake.posted) == 1  # a failed read posts no further batch
    mover.close()
    assert fake.calls == ["connect p", "disconnect p", "close"]


def test_cancel_waits_for_the_batch_in_flight(fake: FakeTransport, start: Start) -> None:
    mover = start()
    fake.state = CopyState.PENDING
    mover.read(read("a", 0, 10))
    mover.seal(SealJob("posted by now", [1]))
    wait_for(mover, count(1))
    mover.cancel("a")
    mover.cancel("unknown")
    mover.seal(SealJob("later", [1]))
    assert [type(c) for c in wait_for(mover, count(1))] == [Sealed]
    fake.state = CopyState.DONE
    assert wait_for(mover, count(1)) == [ReadFailed("a", "cancelled")]


def test_failures_are_answers(fake: FakeTransport, start: Start) -> None:
    mover = start()
    mover.connect("q", "fake", b"bad")
    mover.connect("r", "other", b"")
    mover.read(ReadJob("stranger", "q", "fake", [1], [1]))
    mover.read(ReadJob("uneven", "p", "fake", [1, 2], [1]))
    mover.read(ReadJob("unevenly checked", "p", "fake", [1, 2], [1, 2], [3]))
    mover.read(ReadJob("empty", "p", "fake", [], []))
    heard = wait_for(mover, count(6))
    assert [(c.peer, c.transport) for c in heard if isinstance(c, ConnectFailed)] == [("q", "fake"), ("r", "other")]
    assert {c.tag for c in heard if isinstance(c, ReadFailed)} == {"stranger", "uneven", "unevenly checked"}
    assert [c.size_bytes for c in heard if isinstance(c, ReadDone)] == [0]
    assert fake.posted == []
    fake.refuse = True
    mover.read(read("refused", 0, 1))
    assert wait_for(mover, count(1)) == [ReadFailed("refused", "refused")]
    fake.refuse, fake.state = False, CopyState.FAILED
    mover.read(read("broken", 0, 1))
    assert isinstance(wait_for(mover, count(1))[0], ReadFailed)


def test_reads_after_disconnect_fail_and_reconnect_works(fake: FakeTransport, start: Start) -> None:
    mover = start()
    mover.disconnect("p")
    mover.read(read("a", 0, 1))
    assert isinstance(wait_for(mover, count(1))[0], ReadFailed)
    mover.connect("p", "fake", b"fake")
    mover.read(read("b", 0, 1))
    assert isinstance(wait_for(mover, count(1))[0], ReadDone)
    mover.connect("p", "fake", b"fake")
    mover.connect("p", "fake", b"moved")
    mover.close()
    assert fake.calls == ["connect p", "disconnect p", "connect p", "connect p", "close"]


def test_close_says_when_a_copy_is_still_in_flight(fake: FakeTransport, start: Start) -> None:
    mover = start()
    fake.state = CopyState.PENDING
    mover.read(read("a", 0, 1))
    mover.seal(SealJob("posted by now", [1]))
    wait_for(mover, count(1))
    assert mover.close(drain_s=0.05) is False
    assert "close" not in fake.calls


def test_close_ends_the_thread(fake: FakeTransport, start: Start) -> None:
    mover = start()
    mover.read(read("a", 0, 50))
    assert mover.close() is True
    assert mover.close() is True
    assert fake.calls[-1] == "close"
    assert not any(thread.name == "page-mover" for thread in threading.enumerate())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_is_heard(fake: FakeTransport, start: Start) -> None:
    woken = threading.Event()
    mover = start(wake=woken.set)
    fake.poll = lambda copy: 1 / 0  # type: ignore[method-assign]
    mover.read(read("a", 0, 1))
    assert woken.wait(60)
    with pytest.raises(RuntimeError) as caught:
        mover.poll_done()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
