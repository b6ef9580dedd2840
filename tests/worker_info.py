"""A worker for tests to speak of."""

from __future__ import annotations

from typing import Any

from penstock.common.messages import WorkerInfo


def worker_info(
    worker_id: str = "decode-0", incarnation: str = "i1", role: str = "decode", **fields: Any
) -> WorkerInfo:
    """One that is small, with 100 pages of 4 tokens and 64 bytes; `fields` are what a test wants otherwise."""
    small = {
        "address": "tcp://127.0.0.1:1",
        "fingerprint": "f",
        "model": "m",
        "served_models": ["m"],
        "page_size": 4,
        "num_pages": 100,
        "page_bytes": 64,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "vocab_size": 256,
    }
    return WorkerInfo(worker_id=worker_id, incarnation=incarnation, role=role, **small | fields)
