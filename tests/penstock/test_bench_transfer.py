"""benchmarks/transfer.py on CPU: its plan, its rows, and a record of real transfers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.transfer import GPU_TOKENS, ON_GPU, PAGE_TOKENS, TOKEN_BYTES, links, main, row


def test_the_plan_covers_every_transport_page_size_and_length() -> None:
    planned = links(ON_GPU, ("cuda:0", "cuda:1"), PAGE_TOKENS, GPU_TOKENS, 5)
    assert [(name, size) for name, size, _ in planned] == [(name, size) for name in ON_GPU for size in PAGE_TOKENS]
    for name, size, spec in planned:
        assert (spec.lender_device, spec.reader_device, spec.push) == ("cuda:0", "cuda:1", name == "nixl-write")
        assert spec.page_bytes == size * 131072 and max(spec.passes) < spec.num_pages
        assert [pages * size for pages in spec.passes] == [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]


def test_a_row_says_bytes_time_and_rate() -> None:
    assert row("shm", 16, 8, 0.004) == {
        "transport": "shm", "page_tokens": 16, "tokens": 128, "bytes": 1 << 24, "ms": 4.0, "gb_s": 4.19,
    }  # fmt: skip


def test_a_run_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    out = tmp_path / "transfer.json"
    flags = [
        "--devices",
        "cpu,cpu",
        "--tokens",
        "64,128",
        "--page-tokens",
        "16,64",
        "--repeats",
        "2",
        "--out",
        str(out),
    ]
    assert main([*flags, "--transports", "shm,nixl-write-tcp"]) == 0
    record = json.loads(out.read_text())
    assert record["commit"] == "abc1234" and record["peer_copy_gb_s"] > 0 and record["errors"] == []
    assert [(r["transport"], r["page_tokens"], r["tokens"]) for r in record["rows"]] == [
        (transport, size, tokens)
        for transport in ("shm", "nixl-write-tcp")
        for size in (16, 64)
        for tokens in (64, 128)
    ]
    for found in record["rows"] + record["checksums"]:
        assert found["bytes"] == found["tokens"] * TOKEN_BYTES
        assert found["gb_s"] == pytest.approx(found["bytes"] / found["ms"] / 1e6, rel=0.01)


def test_a_transport_that_fails_is_said_and_the_others_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    out = tmp_path / "transfer.json"
    flags = ["--devices", "cpu,cpu", "--tokens", "16", "--page-tokens", "16", "--repeats", "1", "--out", str(out)]
    assert main([*flags, "--transports", "cuda_ipc,shm"]) == 1
    record = json.loads(out.read_text())
    assert [found["transport"] for found in record["rows"]] == ["shm"]
    assert record["errors"][0].startswith("cuda_ipc, pages of 16 tokens: ") and "not cpu" in record["errors"][0]
    assert "cuda_ipc, pages of 16 tokens: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown carrier"):
        main([*flags, "--transports", "carrier"])
