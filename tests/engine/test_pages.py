"""The page ledger: rules by hand, then a random machine against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.common.page_hash import chained, page_hashes, root_hash
from penstock.engine.pages import NoRoom, PageManager


def _names(count: int) -> list[bytes]:
    return list(page_hashes(root_hash("test"), list(range(count * 4)), 4))


def test_a_page_given_out_again_is_another_generation() -> None:
    pages = PageManager(1, 4)
    (page,) = pages.allocate("a", 1)
    pages.name(page, b"h")
    assert pages.holders() == {"a": [(page, 1)]}
    pages.release("a")
    pages.hold("b", pages.match([b"h"]))
    assert pages.generation(page) == 1  # the same contents
    pages.release("b")
    pages.allocate("c", 1)
    assert pages.holders() == {"c": [(page, 2)]}


def test_released_pages_are_found_again_and_evicted_oldest_end_first() -> None:
    pages = PageManager(4, 4)
    names = _names(4)
    table = pages.allocate("a", 3)
    for page, (name, parent) in zip(table, chained(names), strict=False):
        pages.name(page, name, parent)
    assert pages.drain_events() == (chained(names[:3]), [])
    pages.release("a")
    assert pages.match(names) == table
    assert pages.num_available == 4
    pages.allocate("b", 2)  # the empty page, then the chain's last one
    assert pages.match(names) == table[:2]
    assert pages.drain_events() == ([], [names[2]])
    assert pages.drain_events() == ([], []), "told once: it may have been named again meanwhile"
    pages.check()


def test_a_held_prefix_is_shared_and_stays() -> None:
    pages = PageManager(3, 4)
    (page,) = pages.allocate("a", 1)
    pages.name(page, _names(1)[0])
    pages.hold("b", pages.match(_names(1)))
    pages.release("a")
    pages.allocate("c", 2)
    assert pages.table("b") == [page]
    with pytest.raises(NoRoom):
        pages.allocate("c", 1)
    pages.release("b")
    pages.release("c")
    assert pages.num_held == 0


def test_promised_pages_are_nobody_elses() -> None:
    pages = PageManager(4, 4)
    pages.promise("a", 3)
    with pytest.raises(NoRoom):
        pages.allocate("b", 2)
    pages.allocate("a", 2)
    assert pages.num_promised == 1
    assert pages.num_available == 1
    pages.release("a")
    assert pages.num_promised == 0
    assert pages.num_available == 4


def test_what_somebody_holds_already_takes_no_room_to_hold_as_well() -> None:
    pages = PageManager(3, 4)
    names = _names(2)
    for page, name in zip(pages.allocate("old", 2), names, strict=True):
        pages.name(page, name)
    found = pages.match(names)
    assert pages.has_room("b", found, 1) and not pages.has_room("b", found, 2)
    pages.release("old")
    pages.promise("other", 2)
    assert not pages.has_room("b", found, 0)
    with pytest.raises(NoRoom):
        pages.hold("b", found)
    pages.check()
    assert not pages.has_claim("b") and pages.match(names) == found, "nothing was changed"


def test_a_claim_is_pages_or_a_promise_and_ends_with_the_last_of_them() -> None:
    pages = PageManager(4, 4)
    pages.promise("a", 2)
    assert pages.has_claim("a")
    (page,) = pages.allocate("a", 1)
    assert pages.forgotten({"b"}) == {"a": 2} and pages.forgotten({"a"}) == {}
    pages.allocate("a", 1)
    pages.move("a", "quarantine", list(pages.table("a")))
    assert not pages.has_claim("a") and pages.forgotten({"a"}) == {"quarantine": 2}
    pages.release_some("quarantine", [page])
    assert pages.holders().keys() == {"quarantine"} and pages.num_free == 3
    pages.release_some("quarantine", list(pages.table("quarantine")))
    assert pages.holders() == {} and pages.num_free == 4
    pages.check()


def test_without_caching_nothing_is_named() -> None:
    pages = PageManager(2, 4, caching=False)
    (page,) = pages.allocate("a", 1)
    pages.name(page, _names(1)[0])
    assert pages.match(_names(1)) == []
    assert pages.drain_events() == ([], [])


HOLDERS = st.sampled_from(["a", "b", "c", "d"])


class Ledger(RuleBasedStateMachine):
    """Random holders on a small pool; the model is a dict of lists and the ledger's own `check`."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.pages = PageManager(num_pages, 4)
        self.tables: dict[str, list[int]] = {}
        self.promises: dict[str, int] = {}
        self.names: dict[bytes, int] = {}

    def _free(self) -> int:
        held = {page for table in self.tables.values() for page in table}
        return self.pages.num_pages - len(held)

    @rule(holder=HOLDERS, count=st.integers(0, 5))
    def allocate(self, holder: str, count: int) -> None:
        others = sum(self.promises.values()) - self.promises.get(holder, 0)
        if count > self._free() - others - max(0, self.promises.get(holder, 0) - count):
            with pytest.raises(NoRoom):
                self.pages.allocate(holder, count)
            return
        new = self.pages.allocate(holder, count)
        held = {page for table in self.tables.values() for page in table}
        assert len(set(new)) == count
        assert not held & set(new), "a page was given out twice"
        self.names = {name: page for name, page in self.names.items() if page not in new}
        self.tables.setdefault(holder, []).extend(new)
        self.promises[holder] = max(0, self.promises.get(holder, 0) - count)

    @rule(holder=HOLDERS, count=st.integers(0, 5))
    def promise(self, holder: str, count: int) -> None:
        if count > self._free() - sum(self.promises.values()):
            with pytest.raises(NoRoom):
                self.pages.promise(holder, count)
            return
        self.pages.promise(holder, count)
        self.promises[holder] = self.promises.get(holder, 0) + count

    @rule(holder=HOLDERS)
    def release(self, holder: str) -> None:
        assert self.pages.release(holder) == self.tables.pop(holder, [])
        self.promises.pop(holder, None)

    @precondition(lambda self: any(self.tables.values()))
    @rule(data=st.data())
    def name_a_page(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from([h for h, table in self.tables.items() if table]))
        page = data.draw(st.sampled_from(self.tables[holder]))
        name = bytes([data.draw(st.integers(0, 9))])
        if name not in self.names and page not in self.names.values():
            self.names[name] = page
        self.pages.name(page, name)

    @rule(holder=HOLDERS, name=st.integers(0, 9))
    def match_and_hold(self, holder: str, name: int) -> None:
        found = self.pages.match([bytes([name])])
        assert found == ([self.names[bytes([name])]] if bytes([name]) in self.names else [])
        if found and found[0] not in self.tables.get(holder, []):
            revived = all(found[0] not in table for table in self.tables.values())
            if revived and self._free() == sum(self.promises.values()):
                assert self.pages.with_room(found) == []
                with pytest.raises(NoRoom):
                    self.pages.hold(holder, found)
                return
            assert self.pages.with_room(found) == found
            self.pages.hold(holder, found)
            self.tables.setdefault(holder, []).extend(found)

    @precondition(lambda self: any(self.tables.values()))
    @rule(data=st.data(), to=HOLDERS)
    def move(self, data: st.DataObject, to: str) -> None:
        holder = data.draw(st.sampled_from([h for h, table in self.tables.items() if table]))
        page = data.draw(st.sampled_from(self.tables[holder]))
        if page in self.tables.get(to, []):
            return
        self.pages.move(holder, to, [page])
        self.tables[holder].remove(page)
        self.tables.setdefault(to, []).append(page)

    @rule(holder=HOLDERS, to=HOLDERS)
    def move_all(self, holder: str, to: str) -> None:
        if holder != to:
            self.pages.move_all(holder, to)
            self.promises.pop(holder, None)
            if self.tables.get(holder):
                self.tables.setdefault(to, []).extend(self.tables.pop(holder))

    @invariant()
    def consistent(self) -> None:
        self.pages.check()
        for holder in "abcd":
            assert self.pages.table(holder) == self.tables.get(holder, [])
        assert self.pages.num_free == self._free()
        assert self.pages.num_promised == sum(self.promises.values())

    def teardown(self) -> None:
        for holder in "abcd":
            self.pages.release(holder)
        assert self.pages.num_held == self.pages.num_promised == 0


TestLedger = Ledger.TestCase
