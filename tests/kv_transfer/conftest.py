"""Pools, movers and lenders that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from penstock.kv_transfer.mover import PageMover
from penstock.kv_transfer.select import OPENERS
from tests.kv_transfer.pools import Lender, Pool

StartLender = Callable[..., Lender]
Reader = tuple[Pool, PageMover]


@pytest.fixture
def lend() -> Iterator[StartLender]:
    """Starts lenders; those not killed must leave with exit code 0."""
    lenders: list[Lender] = []

    def start(transport: str, page_bytes: int, num_pages: int, seed: int = 1, ucx_tls: str = "") -> Lender:
        lenders.append(Lender(transport, page_bytes, num_pages, seed, ucx_tls))
        return lenders[-1]

    yield start
    assert all(lender.close() in (0, -9) for lender in lenders)


@pytest.fixture
def read_with() -> Iterator[Callable[..., Reader]]:
    """Opens a reader's pool (zeros) and mover in this process."""
    readers: list[Reader] = []

    def start(transport: str, page_bytes: int, num_pages: int, stall_s: float = 10.0) -> Reader:
        pool = Pool(page_bytes, num_pages)
        opened = OPENERS[transport](pool.region, f"reader-{len(readers)}")
        readers.append((pool, PageMover(pool.region, [opened], stall_s=stall_s)))
        return readers[-1]

    yield start
    for pool, mover in readers:
        assert mover.close()
        pool.close()
