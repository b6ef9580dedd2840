"""Measuring a link between real processes: times of whole passes, errors in words, nothing left running."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from penstock.kv_transfer.base import TransportError
from penstock.kv_transfer.link_rate import LinkSpec, make_pages, measure, scattered

SHM = LinkSpec("shm", "cpu", "cpu", page_bytes=4096, num_pages=16, passes=(1, 9), repeats=2)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = {process.pid for process in psutil.process_iter()}
    yield
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if "link_rate" in " ".join(p.info["cmdline"] or [])]
    assert not set(left) - before


@pytest.mark.parametrize("spec", [SHM, replace(SHM, transport="nixl", push=True, ucx_tls="tcp")], ids=["shm", "push"])
def test_every_pass_is_timed(spec: LinkSpec) -> None:
    times = measure(spec, timeout_s=30)
    assert [one.pages for one in times] == [1, 9]
    assert all(0.0 < one.best_s <= one.median_s for one in times)


@pytest.mark.parametrize(
    ("spec", "timeout_s", "words"),
    [
        (SHM, 0.01, "no answer within"),
        (replace(SHM, push=True), 30, "shm only reads"),
        (replace(SHM, lender_device="cuda:99"), 30, "the lender"),
        (replace(SHM, transport="nixl", ucx_tls="bogus"), 30, "the lender: .*NIXL"),
    ],
    ids=["late", "impossible", "no device", "no such way"],
)
def test_what_does_not_work_says_why(spec: LinkSpec, timeout_s: float, words: str) -> None:
    with pytest.raises(TransportError, match=words):
        measure(spec, timeout_s)


def test_impossible_passes_are_refused() -> None:
    for wrong in ({"passes": (17,)}, {"passes": ()}, {"passes": (0,)}, {"page_bytes": 4100}):
        with pytest.raises(ValueError, match="cannot be measured"):
            replace(SHM, **wrong)


def test_pages_know_their_numbers() -> None:
    pages = make_pages("cpu", 64, 3, first=7)
    assert pages.ends().tolist() == [[7, 7], [8, 8], [9, 9]]
    pages.ends()
    pages.close()
    order = scattered(5, 9, seed=1)
    assert len(set(order)) == 5 and set(order) <= set(range(9))
