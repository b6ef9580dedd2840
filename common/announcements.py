"""What a worker still has to tell the prefix index. Pure: page changes in, numbered batches out; no clock, no I/O.

A page is announced only while the page before it is: what lies behind a gap is of no use to a request, and what the
index knows of a sequence then has one end, which a look-up finds by bisection. A held page without its parent is an
orphan; it is announced when its parent comes back.

Batches are numbered from 1 in each slot of the index, and one is under way at a time: until it is acknowledged `next`
gives the same one again, however often. Writing a batch twice is harmless; leaving one out is noticed by the index.
Used by the registry thread (redis_state.py), which locks around every call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

BATCH_PAGES = 500  # a batch holds up Redis for about a millisecond


@dataclass(frozen=True)
class Batch:
    """Page hashes that the worker holds, and some that it does not hold any more. `again`: they were announced before,
    so the index should know them."""

    seq: int
    held: list[bytes]
    gone: list[bytes]
    again: bool = False


class Announcements:
    """The pages of one worker, and which of the changes the index has not got yet.

    `max_pending` bounds what is kept for an index that is away; beyond it `overflowed` asks for a `restart`.
    """

    def __init__(self, max_pending: int) -> None:
        self.seq = 0  # of the last batch that was acknowledged
        self.overflowed = False
        self._max_pending = max_pending
        self._held: dict[bytes, bytes] = {}  # page hash -> its parent, b"" at the beginning of a sequence
        self._children: dict[bytes, set[bytes]] = {}  # of the held pages, by parent, which need not be held
        self._orphans: set[bytes] = set()
        self._pending: dict[bytes, bool] = {}  # page hash -> it is held now
        self._round: list[bytes] = []  # pages to announce again before the next round begins, from the end
        self._again: list[bytes] = []
        self._told_again = True  # by the last batch: then it is the changes' turn, if there are any
        self._under_way: Batch | None = None

    @property
    def num_held(self) -> int:
        """Pages the worker caches."""
        return len(self._held)

    @property
    def num_pending(self) -> int:
        """Changes that are in no batch yet."""
        return len(self._pending)

    def publish(self, added: Iterable[tuple[bytes, bytes]], removed: Iterable[bytes]) -> None:
        """The worker does not cache `removed` any more, and caches `added`: (page hash, parent). Unknown ones of the
        former and known ones of the latter change nothing."""
        for page in removed:
            parent = self._held.pop(page, None)
            if parent is None:
                continue
            siblings = self._children[parent]
            siblings.discard(page)
            if not siblings:
                del self._children[parent]
            if page in self._orphans:
                self._orphans.discard(page)
            else:
                for child in self._behind(page):
                    self._orphans.add(child)
                    self._pending[child] = False
                self._pending[page] = False
        for page, parent in added:
            if page in self._held:
                continue
            self._held[page] = parent
            self._children.setdefault(parent, set()).add(page)
            if parent and (parent not in self._held or parent in self._orphans):
                self._orphans.add(page)
                continue
            self._pending[page] = True
            for child in self._behind(page):
                self._orphans.discard(child)
                self._pending[child] = True
        if len(self._pending) > self._max_pending:
            self._pending.clear()
            self.overflowed = True

    def next(self) -> Batch | None:
        """The batch to write now; None: the index knows everything.

        Changes and what is announced again take turns: where writing takes longer than a step there always are changes.
        """
        if self._under_way is None and self._again and not (self._pending and self._told_again):
            again, self._again = self._again[:BATCH_PAGES], self._again[BATCH_PAGES:]
            held = [page for page in again if self._is_announced(page)]
            if held:
                self._under_way = Batch(self.seq + 1, held, [], again=True)
                self._told_again = True
        if self._under_way is None and self._pending:
            changes = list(islice(self._pending.items(), BATCH_PAGES))
            for page, _ in changes:
                del self._pending[page]
            held = [page for page, is_held in changes if is_held]
            gone = [page for page, is_held in changes if not is_held]
            self._under_way = Batch(self.seq + 1, held, gone)
            self._told_again = False
        return self._under_way

    def acknowledged(self) -> None:
        """The batch under way is written."""
        assert self._under_way is not None
        self.seq, self._under_way = self._under_way.seq, None

    def restart(self) -> None:
        """The index holds nothing of this worker: announce all its pages, from batch 1."""
        self.seq, self._under_way, self.overflowed = 0, None, False
        self._again.clear()
        self._pending = {page: True for page in self._held if page not in self._orphans}

    def repeat(self, count: int) -> None:
        """Announce `count` pages again, in turn: what the index lost is there again after a round."""
        if not self._round:
            self._round = list(self._held)
        cut = max(0, len(self._round) - count)
        self._again += self._round[cut:]
        del self._round[cut:]

    def leave(self) -> None:
        """The worker ends: it holds nothing any more."""
        self._pending = dict.fromkeys((*self._pending, *reversed(self._held)), False)
        for kept in (self._held, self._children, self._orphans, self._again, self._round):
            kept.clear()

    def _is_announced(self, page: bytes) -> bool:
        """The index should know it: it is held, and no change of it is still to be told."""
        return page in self._held and page not in self._orphans and page not in self._pending

    def _behind(self, page: bytes) -> list[bytes]:
        """Held pages of which `page` is an ancestor: parents before children."""
        found = list(self._children.get(page, ()))
        for child in found:
            found += self._children.get(child, ())
        return found
