"""benchmarks/memory_trace.py on a tiny shape on CPU: a crowded pool, and a trace that leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import memory_trace

LIMITS = ("max_num_seqs=8", "max_model_len=256", "block_size=4", "kv_cache_memory_bytes=120000", "cpu_threads=1")


def arguments(out: Path) -> list[str]:
    return ["--models", "tiny", "--seconds", "3", "--device", "cpu", "--out", str(out), "--engine-option", *LIMITS]


def test_a_crowded_pool_is_empty_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    out = tmp_path / "trace.json"
    assert memory_trace.main(arguments(out)) == 0
    found = json.loads(out.read_text())["tiny"]
    assert found["finished"] > 8
    assert found["most_pages_held"] > 0.9 * found["pages"]
    assert found["pages_held_at_the_end"] == 0
    assert found["probes_equal"]


def test_changed_tokens_fail_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_trace, "probe", lambda _built, salt: [[ord(letter) for letter in salt]])
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    assert memory_trace.main(arguments(tmp_path / "trace.json")) == 1


def test_the_same_seed_draws_the_same_requests() -> None:
    first, second = (memory_trace.Requests(400, 256, seed=1) for _ in range(2))
    drawn = [first.draw() for _ in range(300)]
    assert drawn == [second.draw() for _ in range(300)]
    assert any(len(request.prompt_token_ids) == 255 for request in drawn)
    assert all(len(request.prompt_token_ids) + request.sampling.max_tokens <= 256 for request in drawn)
