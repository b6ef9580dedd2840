"""Who holds which KV page. Pure bookkeeping: no tensors, no clock. Used by the scheduler and by both workers' hand-off.

Every page is in exactly one place:

    free ──allocate──> held by one or more holders ──release──> cached (named by its page hash, nobody holds it)
     ^                        (request, hand-off, quarantine)     │  ^         │
     └────────────────────────────release, no hash────────────────┘  └─match, hold     evicted, oldest first

A holder is a string (a request's key, "loan-7", "quarantine"); its pages, in order, are its page table. Full pages are
named by chained page hashes (common/page_hash.py) and found again by `match`. A promise reserves a number of pages, not
which ones.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container, Iterable, Sequence


class NoRoom(Exception):
    """Not enough pages; nothing was changed."""


class PageManager:
    """The page ledger of one KV group in one worker."""

    def __init__(self, num_pages: int, page_size: int, *, caching: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.caching = caching
        self._free: deque[int] = deque(range(num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()  # pages nobody holds, least recently used first
        self._refs = [0] * num_pages
        self._generations = [0] * num_pages  # how often each page was given out empty: its contents' number
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._tables: dict[str, list[int]] = {}
        self._promises: dict[str, int] = {}
        self._promised = 0
        self._added: list[tuple[bytes, bytes]] = []
        self._removed: list[bytes] = []

    # ------------------------------------------------------------ questions

    @property
    def num_free(self) -> int:
        """Pages nobody holds: empty ones, and cached ones that may be evicted."""
        return len(self._free) + len(self._cached)

    @property
    def num_available(self) -> int:
        """Free pages that nobody has been promised."""
        return self.num_free - self._promised

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_free

    @property
    def num_promised(self) -> int:
        return self._promised

    def has_claim(self, holder: str) -> bool:
        """Whether pages are held by or promised to this holder."""
        return holder in self._tables or holder in self._promises

    def table(self, holder: str) -> list[int]:
        """The holder's pages, in order. A live view: do not change it, copy it to keep it."""
        return self._tables.get(holder, [])

    def generation(self, page: int) -> int:
        """The number of the page's contents: it grows whenever the page is given out empty."""
        return self._generations[page]

    def holders(self) -> dict[str, list[tuple[int, int]]]:
        """Every holder with its pages, each with its generation. For people who look for a leak."""
        return {holder: [(page, self._generations[page]) for page in table] for holder, table in self._tables.items()}

    def forgotten(self, known: Container[str]) -> dict[str, int]:
        """Holders that are not `known` to anybody, each with how many pages it has or was promised: a leak."""
        claims = {**self._promises, **self._tables}
        return {h: len(self.table(h)) + self._promises.get(h, 0) for h in claims if h not in known}

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens fill."""
        return -(-num_tokens // self.page_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Pages of the longest known prefix of this chain. Changes nothing: `hold` them before allocating."""
        pages: list[int] = []
        if self.caching:
            for name in hashes:
                page = self._page_of.get(name)
                if page is None:
                    break
                pages.append(page)
        return pages

    def has_room(self, holder: str, matched: Sequence[int], extra: int) -> bool:
        """Whether `holder` can hold `matched` and allocate `extra` more pages besides what others were promised."""
        revived = sum(1 for page in matched if self._refs[page] == 0)
        return revived + extra <= self.num_available + self._promises.get(holder, 0)

    def with_room(self, pages: Sequence[int]) -> list[int]:
        """As many of these held or cached pages, from the first on, as can be held beside all promises."""
        room = self.num_available
        for index, page in enumerate(pages):
            room -= self._refs[page] == 0
            if room < 0:
                return list(pages[:index])
        return list(pages)

    def is_shared(self, page: int) -> bool:
        """Whether a held page has more than one holder."""
        return self._refs[page] > 1

    # ------------------------------------------------------------ changes

    def hold(self, holder: str, pages: Sequence[int]) -> None:
        """Append `pages` to the holder's table; cached ones leave the eviction order. Pages must be held or cached.

        Raises:
            NoRoom: cached ones among them are needed for what was promised.
        """
        if len(self.with_room(pages)) < len(pages):
            raise NoRoom(f"{len(pages)} pages to hold, {self.num_available} available")
        table = self._tables.setdefault(holder, [])
        for page in pages:
            if self._refs[page] == 0:
                del self._cached[page]
            self._refs[page] += 1
            table.append(page)

    def allocate(self, holder: str, count: int) -> list[int]:
        """Append `count` empty pages to the holder's table, from its promise first; evicts cached pages as needed.

        Raises:
            NoRoom: not that many pages are left besides what others were promised.
        """
        own_promise = self._promises.get(holder, 0)
        if count > self.num_available + own_promise:
            raise NoRoom(f"{count} pages wanted, {self.num_available} available")
        self._set_promise(holder, max(0, own_promise - count))
        pages = [self._take() for _ in range(count)]
        self._tables.setdefault(holder, []).extend(pages)
        return pages

    def release(self, holder: str) -> list[int]:
        """The holder gives up its pages and its promise; unknown holders are fine. Returns the pages it had.

        Last pages first, so that of one sequence the end is evicted before the beginning that others may share.
        """
        self._set_promise(holder, 0)
        pages = self._tables.pop(holder, [])
        for page in reversed(pages):
            self._drop(page)
        return pages

    def release_some(self, holder: str, pages: Iterable[int]) -> None:
        """The holder gives up these of its pages (each must be in its table)."""
        for page in pages:
            self._take_from(holder, page)
            self._drop(page)

    def move(self, holder: str, new_holder: str, pages: Iterable[int]) -> None:
        """These pages of `holder` change hands, to quarantine, say."""
        for page in pages:
            self._take_from(holder, page)
            self._tables.setdefault(new_holder, []).append(page)

    def move_all(self, holder: str, new_holder: str) -> None:
        """All pages of `holder` change hands, and its promise ends; unknown holders are fine."""
        self._set_promise(holder, 0)
        pages = self._tables.pop(holder, None)
        if pages:
            self._tables.setdefault(new_holder, []).extend(pages)

    def promise(self, holder: str, count: int) -> None:
        """Reserve `count` pages for `holder`, which allocates them later.

        Raises:
            NoRoom: they are not available.
        """
        if count > self.num_available:
            raise NoRoom(f"{count} pages wanted, {self.num_available} available")
        self._set_promise(holder, self._promises.get(holder, 0) + count)

    def end_promise(self, holder: str) -> None:
        """The holder will not allocate the rest of what it was promised."""
        self._set_promise(holder, 0)

    def name(self, page: int, page_hash: bytes, parent: bytes = b"") -> None:
        """The page is complete and its content is what `page_hash` says: others may find it. First come, first kept.

        `parent` is the hash of the page before it, b"" at the beginning of a sequence.
        """
        if self.caching and page_hash not in self._page_of and self._hash_of[page] is None:
            self._hash_of[page] = page_hash
            self._page_of[page_hash] = page
            self._added.append((page_hash, parent))

    def drain_events(self) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
        """What was named, as (page hash, parent), and which page hashes went, since the last call: for the index."""
        added, removed = self._added, self._removed
        if added or removed:
            self._added, self._removed = [], []
        return added, removed

    def check(self) -> None:
        """Raise AssertionError unless every page is in exactly one place. For tests and idle moments."""
        refs = [0] * self.num_pages
        for table in self._tables.values():
            for page in table:
                refs[page] += 1
        assert refs == self._refs, "page tables and reference counts disagree"
        unheld = [page for page in range(self.num_pages) if refs[page] == 0]
        assert sorted([*self._free, *self._cached]) == unheld, "a page is lost or in two places"
        assert all(self._hash_of[page] is None for page in self._free), "a free page is still named"
        assert {h: p for p, h in enumerate(self._hash_of) if h is not None} == self._page_of, "page names disagree"
        assert self._promised == sum(self._promises.values()) <= self.num_free, "promises exceed free pages"

    # ------------------------------------------------------------ inside

    def _set_promise(self, holder: str, count: int) -> None:
        self._promised += count - self._promises.get(holder, 0)
        if count:
            self._promises[holder] = count
        else:
            self._promises.pop(holder, None)

    def _take_from(self, holder: str, page: int) -> None:
        table = self._tables[holder]
        table.remove(page)
        if not table:
            del self._tables[holder]

    def _take(self) -> int:
        if self._free:
            page = self._free.popleft()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._refs[page] = 1
        self._generations[page] += 1
        return page

    def _drop(self, page: int) -> None:
        self._refs[page] -= 1
        if self._refs[page] == 0:
            if self._hash_of[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def _forget(self, page: int) -> None:
        page_hash = self._hash_of[page]
        assert page_hash is not None
        self._hash_of[page] = None
        del self._page_of[page_hash]
        self._removed.append(page_hash)
