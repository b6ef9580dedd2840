"""Jobs that take turns, over links of all paces, under a clock of the test's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.kv_transfer.base import Copy, CopyState, Transport
from penstock.kv_transfer.jobs import Completion, ReadDone, ReadFailed, ReadJob, ReadSettled, ReadStalled, SealJob
from penstock.kv_transfer.link_pace import LinkPace
from penstock.kv_transfer.work import Read, Seal, Turns

PAGE_BYTES = 256 << 10
STALL_S = 5.0
TURN_S = 0.1


class Link(Transport):
    """Moves `bytes_per_s`, shared evenly by the copies in flight; nothing while it is cut."""

    name = "link"

    def __init__(self, bytes_per_s: float) -> None:
        self.now = 0.0
        self.bytes_per_s = bytes_per_s
        self.most_in_flight = 0
        self._left: dict[Copy, float] = {}  # bytes of copies in flight

    def clock(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        moved = seconds * self.bytes_per_s
        while self._left and moved > 0:  # what one copy does not need the others get
            share = min(moved / len(self._left), *self._left.values()) if len(self._left) > 1 else moved
            moved -= share * len(self._left)
            self._left = {copy: left - share for copy, left in self._left.items() if left - share > 1e-6}

    def post(self, peer: str, src_pages: Sequence[int], dst_pages: Sequence[int]) -> Copy:
        copy = Copy(peer, len(dst_pages) * PAGE_BYTES)
        self._left[copy] = float(copy.size_bytes)
        self.most_in_flight = max(self.most_in_flight, len(self._left))
        return copy

    def poll(self, copy: Copy) -> CopyState:
        return CopyState.PENDING if copy in self._left else CopyState.DONE

    def progress(self) -> None: ...

    def description(self) -> bytes:
        return b""

    def connect(self, peer: str, description: bytes) -> None: ...

    def disconnect(self, peer: str) -> None: ...

    def close(self) -> None: ...


class Reads:
    """Reads of one peer: `tickets` a line, each of `pages` pages."""

    def __init__(self, link: Link, lines: int, tickets: int, pages: int) -> None:
        self.link = link
        self.turns = Turns()
        self.pace = LinkPace(32, 1, STALL_S)
        self.heard: list[Completion] = []
        for line in range(lines):
            for ticket in range(tickets):
                self.read(f"{line}.{ticket}", pages, str(line))

    def read(self, tag: str, pages: int, line: str = "") -> None:
        job = ReadJob(tag, "p", "link", range(pages), range(pages), (), line)
        self.turns.start(tag, Read(job, self.link, self.pace, lambda pages: []))

    def run(self, seconds: float) -> None:
        until = self.link.now + seconds
        while self.turns and self.link.now < until:
            while self.turns.advance(self.link.clock):
                pass
            heard = self.turns.completions()
            self.heard += heard
            for item in heard:
                if isinstance(item, ReadStalled) and "." in item.tag:  # as the reader: the rest of it is not wanted
                    for ticket in range(4):
                        self.turns.cancel(f"{item.tag.partition('.')[0]}.{ticket}")
            self.link.pass_time(TURN_S)

    def of(self, kind: type) -> list[str]:
        return [item.tag for item in self.heard if isinstance(item, kind) and hasattr(item, "tag")]


@settings(max_examples=20, deadline=None)
@example(rate=0.2e6, lines=9, tickets=2, pages=4)
@given(rate=st.floats(0.2e6, 1e9), lines=st.integers(1, 40), tickets=st.integers(1, 4), pages=st.integers(1, 48))
def test_a_slow_link_is_not_a_dead_one(rate: float, lines: int, tickets: int, pages: int) -> None:
    """Whatever its pace, and however many reads share it: all of them come, in order within a line."""
    total = lines * tickets * pages * PAGE_BYTES
    rate = max(rate, total / 300)  # so that the test ends
    reads = Reads(Link(rate), lines, tickets, pages)
    reads.run(400 + 100 * lines * tickets)
    assert len(reads.of(ReadDone)) == lines * tickets == len(reads.heard)
    assert reads.turns.moved_bytes == lines * tickets * pages * PAGE_BYTES
    assert reads.link.most_in_flight <= LinkPace.ABREAST
    for line in range(lines):
        done = [tag for tag in reads.of(ReadDone) if tag.startswith(f"{line}.")]
        assert all(int(tag.partition(".")[2]) - place < Read.abreast for place, tag in enumerate(done))


def test_a_read_is_seen_to_get_on_long_before_it_is_done() -> None:
    reads = Reads(Link(PAGE_BYTES), 1, 1, 100)
    seen = []
    for _ in range(8):
        reads.run(10.0)
        seen.append(reads.turns.moved_bytes)
    assert not reads.heard and seen == sorted(set(seen))


def test_a_cut_link_is_found_out_once_and_nothing_more_is_posted() -> None:
    link = Link(50e6)
    reads = Reads(link, lines=12, tickets=3, pages=16)
    reads.run(2.5)
    assert reads.of(ReadDone) and not reads.of(ReadStalled)
    link.bytes_per_s, cut_at = 0.0, link.now
    reads.run(2 * STALL_S)
    assert link.now - cut_at < 2 * STALL_S + 1
    stalled, failed = reads.of(ReadStalled), reads.of(ReadFailed)
    assert 0 < len(stalled) <= LinkPace.ABREAST
    assert len(stalled) + len(failed) + len(reads.of(ReadDone)) == 36
    reads.read("while it is dead", 1)
    reads.run(0.2)
    assert reads.heard[-1] == ReadFailed("while it is dead", "its link has stalled")
    link.bytes_per_s = 50e6
    reads.run(5.0)
    assert sorted(reads.of(ReadSettled)) == sorted(stalled) and not reads.turns
    reads.read("anew", 1)
    reads.run(5.0)
    assert reads.of(ReadDone)[-1] == "anew"


def test_after_a_while_a_stalled_link_is_tried_again() -> None:
    """One transfer was lost for good: those after it are not."""
    link = Link(0.0)
    reads = Reads(link, 1, 1, 1)
    reads.run(STALL_S + 1)
    assert reads.of(ReadStalled) == ["0.0"]
    link.pass_time(STALL_S)
    lost = link._left
    link._left, link.bytes_per_s = {}, 1e6
    link.poll = lambda copy: CopyState.PENDING if copy in lost or copy in link._left else CopyState.DONE  # type: ignore[method-assign]
    reads.read("next", 8)
    reads.run(20.0)
    assert reads.of(ReadDone) == ["next"] and len(reads.turns) == 1


def test_a_link_that_was_found_slow_is_given_longer() -> None:
    """A page takes 8 s: the first one counts as stalled, and is known to have come; those after it are waited for."""
    reads = Reads(Link(PAGE_BYTES / 8.0), 1, 1, 1)
    reads.run(30.0)
    assert reads.of(ReadStalled) == reads.of(ReadSettled) == ["0.0"]
    reads.read("next", 3)
    reads.run(60.0)
    assert reads.of(ReadDone) == ["next"]


def test_a_read_that_a_busy_link_forgets_is_given_up() -> None:
    pace = LinkPace(8, 8, STALL_S)
    for _ in range(2):
        pace.posted()
    for second in range(1, 60):
        assert not pace.stalled(0.0, 8, float(second))
        pace.arrived(0.3, 8, float(second))
        pace.posted()
    assert pace.stalled(0.0, 8, 60.0)
    assert not pace.is_dead(60.0)  # what others read over it goes on
    pace.arrived(0.3, 8, 60.5)
    assert not pace.is_dead(61.0) and pace.has_room


def test_seals_of_a_line_end_in_order_and_lines_take_turns() -> None:
    turns = Turns()
    for tag in ("a1", "a2", "b1", "b2"):
        turns.start(tag, Seal(SealJob(tag, range(8), line=tag[0]), 4, list))
    turns.start("alone", Seal(SealJob("alone", range(4)), 4, list))
    order: list[list[str]] = []
    while turns:
        turns.advance(lambda: 0.0)
        order.append([item.tag for item in turns.completions() if hasattr(item, "tag")])
    assert order == [["alone"], ["a1", "b1"], [], ["a2", "b2"]]


def test_cancelled_before_their_turn() -> None:
    turns = Turns()
    pace = LinkPace(4, 4, STALL_S)
    for tag in ("1", "2", "3"):
        job = ReadJob(f"read {tag}", "p", "link", [1], [1], (), "reads")
        turns.start(job.tag, Read(job, Link(1.0), pace, lambda pages: []))
        turns.start(f"seal {tag}", Seal(SealJob(f"seal {tag}", [1], line="seals"), 4, list))
    turns.advance(lambda: 0.0)  # the first read is in flight, the first seal is done
    assert len(turns.completions()) == 1
    turns.cancel("read 3")
    turns.cancel("seal 3")
    assert turns.completions() == [ReadFailed("read 3", "cancelled")]
    turns.cancel_all()
    assert turns.completions() == [ReadFailed("read 2", "cancelled")]
    assert len(turns) == 1 and turns.reads_from("p")
    with pytest.raises(ValueError, match="in progress"):
        turns.start("read 1", Seal(SealJob("read 1", [1]), 4, list))


@given(st.lists(st.tuples(st.floats(0.0, 20.0), st.booleans()), max_size=60), st.integers(1, 4096))
def test_batches_follow_the_link(batches: list[tuple[float, bool]], most: int) -> None:
    """Slow ones shrink, quick ones grow again, within one page and the most; a short last batch makes none larger."""
    pace = LinkPace(most, most // 8, STALL_S)
    assert 1 <= pace.pages <= most
    for seconds, last in batches:
        before = pace.pages
        pages = max(1, before // 3) if last else before
        assert pace.has_room
        pace.posted()
        pace.arrived(seconds, pages, 0.0)
        assert 1 <= pace.pages <= most
        if seconds > LinkPace.SLOW_S:
            assert pace.pages == max(1, pages // 2)
        elif seconds >= LinkPace.QUICK_S or (last and pages < before):
            assert pace.pages == before
        else:
            assert pace.pages == min(most, 2 * before)
