"""benchmarks/fetch.py: its figures by hand, and a short run."""

from __future__ import annotations

import pytest

from benchmarks.fetch import Row, chooses_fetch, crossover, measure
from penstock.common.messages import MeasuredRates, WorkerInfo
from penstock.demo_model import CHECKPOINT
from tests.worker_info import worker_info


def worker(name: str) -> WorkerInfo:
    return worker_info(name, name, page_size=16, num_pages=1000, page_bytes=16_000, max_model_len=4096)


def test_rows_and_crossover() -> None:
    rows = [
        Row.of("shm", 64, 10.0, 12.0, fetch=True),
        Row.of("shm", 32, 5.0, 12.0, False),
        Row.of("shm", 128, 20, 13, True),
    ]
    assert [row.excess for row in rows] == pytest.approx([0.2, 0.0, 0.0])
    assert crossover(rows) == pytest.approx(64 + 64 * 2 / 9)  # 2 ms slower, then 7 ms faster
    assert crossover(rows[:2]) is None


def test_the_choice_is_the_policys() -> None:
    """1000 bytes a token: 1 ms a token computed, 40 ms and 0.1 ms a token read."""
    rates = MeasuredRates(prefill_tokens_per_s=1000.0, link_bytes_per_s=1e7, link_setup_ms=40.0)
    assert not chooses_fetch(rates, worker("reader"), worker("source"), 40)  # 32 tokens: 43.2 ms against 32
    assert chooses_fetch(rates, worker("reader"), worker("source"), 80)


@pytest.mark.system
def test_a_short_run() -> None:
    rows, rates = measure(str(CHECKPOINT), "shm", [24, 96], 1, dtype="float32", block_size=8, cpu_threads=1)
    assert [(row.transport, row.tokens) for row in rows] == [("shm", 24), ("shm", 96)]
    assert all(row.compute_ms > 0 and row.fetch_ms > 0 and row.chosen in ("fetch", "compute") for row in rows)
    assert rates.link_bytes_per_s > 0 or rates.link_setup_ms > 0  # so few bytes may all be set-up
