"""Pages of moved requests: kept until they are asked for, or for so long."""

from __future__ import annotations

from penstock.decode_worker.moves import MovedPages, Tail
from penstock.engine.pages import PageManager


def cache(pages: PageManager, *names: bytes) -> None:
    """Another request has computed pages of these names, and has ended."""
    for page, name in zip(pages.allocate("first", len(names)), names, strict=True):
        pages.name(page, name)
    pages.release("first")


def test_kept_until_asked_for_or_expired() -> None:
    pages = PageManager(8, 4)
    moved = MovedPages(pages, keep_s=10.0)
    for name in ("a", "b"):
        held = pages.allocate(name, 2)
        pages.name(held[0], f"{name}0".encode())
        pages.name(held[1], f"{name}1".encode())
        moved.keep(name, 0, pages.match([f"{name}0".encode(), f"{name}1".encode()]), now=5.0)
        pages.release(name)
    moved.keep("empty", 0, [], now=5.0)
    assert moved.total == 3 and len(moved) == 2 and pages.num_held == 4
    moved.release("a", 0)
    moved.release("unknown", 0)
    assert pages.num_held == 2 and len(pages.match([b"a0", b"a1"])) == 2  # cached, like any other
    moved.expire(14.9)
    assert len(moved) == 1
    moved.expire(15.0)
    assert len(moved) == 0 and pages.num_held == 0
    pages.check()


def test_what_stands_behind_the_full_pages_is_found_once_no_step_writes_it() -> None:
    pages = PageManager(8, 4)
    moved = MovedPages(pages, keep_s=10.0)
    full, part = pages.allocate("a", 2)
    pages.name(full, b"full")
    pages.hold("step 3", [part])
    assert moved.keep("a", 0, [full], 0.0, Tail(part, b"part", b"full")) == 2
    pages.release("a")
    assert not moved.is_whole("a", 0) and pages.match([b"full", b"part"]) == [full]
    pages.release("step 3")
    assert moved.is_whole("a", 0) and moved.is_whole("a", 0) and moved.is_whole("unknown", 0)
    assert pages.match([b"full", b"part"]) == [full, part]
    moved.release("a", 0)
    assert pages.num_held == 0
    pages.check()


def test_a_tail_that_nobody_asks_for_goes_with_the_rest() -> None:
    pages = PageManager(8, 4)
    moved = MovedPages(pages, keep_s=10.0)
    (part,) = pages.allocate("a", 1)
    pages.hold("step 3", [part])
    assert moved.keep("a", 0, [], 0.0, Tail(part, b"part", b"")) == 1
    pages.release("a")
    moved.expire(10.0)
    pages.release("step 3")
    assert moved.is_whole("a", 0) and pages.match([b"part"]) == [] and pages.num_held == 0
    pages.check()


def test_what_was_promised_to_others_is_not_kept_from_them() -> None:
    """Pages of the same contents that another request computed first, and that nobody holds."""
    pages = PageManager(4, 4)
    moved = MovedPages(pages, keep_s=10.0)
    cache(pages, b"0", b"1")
    pages.promise("other", 3)
    moved.keep("a", 0, pages.match([b"0", b"1"]), now=0.0)
    pages.check()
    assert pages.num_held == 1 and len(pages.allocate("other", 3)) == 3


def test_a_request_that_comes_back_and_moves_again_is_held_once() -> None:
    pages = PageManager(4, 4)
    moved = MovedPages(pages, keep_s=10.0)
    held = pages.allocate("a", 1)
    pages.name(held[0], b"h")
    moved.keep("a", 0, held, now=0.0)
    moved.keep("a", 0, held, now=8.0)
    pages.release("a")
    moved.expire(12.0)
    assert pages.num_held == 1
    moved.expire(18.0)
    assert pages.num_held == 0
    pages.check()


def test_of_what_was_kept_before_nothing_is_left_when_it_moves_again() -> None:
    pages = PageManager(4, 4)
    moved = MovedPages(pages, keep_s=10.0)
    (part,) = pages.allocate("a", 1)
    pages.hold("step 3", [part])
    moved.keep("a", 0, [], 0.0, Tail(part, b"part", b""))
    pages.release("a")
    (full,) = pages.allocate("a", 1)
    moved.keep("a", 0, [full], 1.0)
    pages.release("a")
    pages.release("step 3")
    assert pages.num_held == 1 and moved.is_whole("a", 0) and pages.match([b"part"]) == []
    moved.release("a", 0)
    assert pages.num_held == 0
    pages.check()


def test_a_tail_that_was_not_kept_is_not_named() -> None:
    """Its page is written by others meanwhile."""
    pages = PageManager(4, 4)
    moved = MovedPages(pages, keep_s=10.0)
    cache(pages, b"0", b"1")
    (part,) = pages.allocate("a", 1)
    pages.promise("other", 2)
    assert moved.keep("a", 0, pages.match([b"0", b"1"]), 0.0, Tail(part, b"part", b"1")) == 1
    pages.release("a")
    assert moved.is_whole("a", 0) and pages.match([b"part"]) == []
    pages.check()
