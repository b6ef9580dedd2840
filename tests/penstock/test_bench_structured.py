"""benchmarks/structured.py on a small vocabulary: every form is walked, every figure recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.structured import FORMS, large_vocabulary, main


def test_every_figure_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "structured.json"
    flags = ["--tokens", "30", "--rows", "2", "--vocabulary", "3000", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["structured.py", *flags])
    main()
    record = json.loads(out.read_text())
    for vocabulary in ("embedded", "synthetic"):
        assert record[vocabulary]["step_of_2_p50_ms"] > 0
        assert all(value > 0 for form in FORMS for value in record[vocabulary][form].values())
    assert record["synthetic"]["vocabulary"] == 3000


def test_synthetic_tokens_are_bytes() -> None:
    tokenizer = large_vocabulary(2000)
    assert tokenizer.byte_tokenizer and tokenizer.vocab_size == 2000
    assert {tokenizer.token_bytes(i) for i in range(2000)} >= {bytes([i]) for i in range(256)}
