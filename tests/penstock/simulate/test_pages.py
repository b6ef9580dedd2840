"""The virtual pages against plain models: who holds what, who is evicted, how long a prefix is held."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from penstock.simulate.page_cache import PageCache
from penstock.simulate.prefix_index import PrefixIndex, workers_of

names = st.integers(0, 12)


@given(st.lists(st.tuples(st.booleans(), names, st.integers(0, 70))), st.lists(names, max_size=6))
def test_the_index_finds_every_workers_longest_prefix(changes: list[tuple[bool, int, int]], prompt: list[int]):
    index, held = PrefixIndex(), set[tuple[int, int]]()
    for adds, page, worker in changes:
        if adds:
            index.add(page, worker)
            held.add((page, worker))
        else:
            index.remove(page, worker)
            held.discard((page, worker))
    everyone = (1 << 71) - 1
    runs = index.runs(prompt, everyone)
    found = {worker: depth for depth, mask in runs for worker in workers_of(mask)}
    for worker in range(71):
        run = 0
        while run < len(prompt) and (prompt[run], worker) in held:
            run += 1
        assert found.pop(worker) == run
    assert not found and len(index) == len({page for page, _ in held})
    depths = [depth for depth, _ in runs]
    assert depths == sorted(set(depths), reverse=True)


prompts = st.lists(names, min_size=1, max_size=5, unique=True)


@given(st.lists(st.tuples(prompts, st.integers(0, 2), st.integers(0, 3))))
def test_a_cache_keeps_what_was_used_last(jobs: list[tuple[list[int], int, int]]):
    """Requests hold and release in any order; the model is a list of cached pages by age, and counters."""
    size = 10
    cache, live = PageCache(size), list[tuple[list[int], int]]()
    held, aged = Counter[int](), list[int]()
    for pages, unnamed, which in jobs:
        if live and which < 2:
            done, extra = live.pop(which % len(live))
            cache.release(done, extra)
            held.subtract(done)
            aged += [page for page in reversed(done) if not held[page]]
        in_use = len(+held) + sum(extra for _, extra in live)
        room = in_use + sum(not held[page] for page in pages) + unnamed <= size
        assert cache.fits(pages, unnamed) is room
        if not room:
            continue
        here = [page for page in pages if held[page] or page in aged]
        assert cache.run(pages) == next((i for i, page in enumerate(pages) if page not in here), len(pages))
        evicted = cache.hold(pages, unnamed)
        held.update(pages)
        live.append((pages, unnamed))
        aged = [page for page in aged if page not in pages]
        over = len(+held) + sum(extra for _, extra in live) + len(aged) - size
        assert evicted == aged[: max(0, over)], "the oldest goes first, and nobody's"
        aged = aged[max(0, over) :]
        assert cache.held == len(+held) + sum(extra for _, extra in live)
    for done, extra in live:
        cache.release(done, extra)
    assert cache.held == 0
